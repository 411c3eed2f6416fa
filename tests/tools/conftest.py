from tests.data_fixtures import keep_loggers, tokenizer_files  # noqa: F401 (found by name)
