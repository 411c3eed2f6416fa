"""What a damaged step folder is answered with, before anything is loaded from it."""

import pytest

from lclm.checkpoint.data_files import read_metadata
from lclm.checkpoint.folder import CheckpointError
from lclm.hf.convert import convert_from_hf
from lclm.train.start import find_start
from tests.checkpoint.samples import save_after, save_hf
from tests.train.sample_data import write_domain
from tests.train.tiny import VOCAB_SIZE, tiny_config


@pytest.fixture
def step_folder(tmp_path):
    save_hf(
        tmp_path / "hf",
        vocab_size=VOCAB_SIZE,
        intermediate_size=64,
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=lambda line: None)
    return tmp_path / "ckpt" / "step_00000000"


def cut(folder):
    data = sorted(folder.glob("*.distcp"))[2]
    data.write_bytes(data.read_bytes()[:-200])


DAMAGES = {
    "short": (cut, r"\.distcp: \d+ bytes, but \.metadata counts on \d+ bytes; .* copy it again"),
    "no data": (lambda f: sorted(f.glob("*.distcp"))[0].unlink(), r"\.distcp: absent, but"),
    "no index": (lambda f: (f / ".metadata").unlink(), r"has no \.metadata; give a step folder"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damage_is_found(step_folder, name):
    damage, message = DAMAGES[name]
    assert read_metadata(step_folder).state_dict_metadata
    damage(step_folder)
    with pytest.raises(CheckpointError, match=message):
        read_metadata(step_folder)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_run_does_not_start_from_it(tmp_path, step_folder, name, resumes):
    prefix = write_domain(tmp_path / "a", num_docs=60, max_length=90, seed=1)
    mixture = [{"prefix": prefix, "packing": "concat", "share": 1.0}]
    changes = {"stage__0__mixture": mixture, "stage__1__mixture": mixture}
    start = step_folder
    if resumes:
        fields = {"step": 1, "stage_step": 1, "tokens": 256}
        start = save_after(step_folder, tmp_path / "run" / "checkpoints", **fields)
        (start.parent / "latest").write_text(start.name)
    else:
        changes["model__init_from"] = str(step_folder)
    config = tiny_config(tmp_path / "run", **changes)
    assert find_start(config).files.keys() == {"hf_source.json", "tokenizer/generation_config.json"}
    damage, message = DAMAGES[name]
    damage(start)
    with pytest.raises(CheckpointError, match=message):
        find_start(config)
