from tests.data_fixtures import (  # noqa: F401 (fixtures are found by name)
    keep_loggers,
    tokenizer_files,
    write_prefix,
)
