"""The last good step, saved when one rank fails: whether it is saved is one decision for all ranks."""

from types import SimpleNamespace

import pytest

from sg_opd.checkpoints.stops import LastGoodStep


@pytest.mark.parametrize("decided", [True, False])
def test_the_main_process_decides_whether_the_step_is_saved(decided, tmp_path, monkeypatch):
    """This rank would decide otherwise, as where nodes see different folders; alone it would wait for ever."""
    written = []
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=2, num_input_tokens_seen=0),
        args=SimpleNamespace(output_dir=tmp_path),
        model=None,
        run_state=lambda: {"tokens": 7},
        _save_checkpoint=lambda *given: written.append(given),
    )
    good = LastGoodStep(trainer)
    good.begin()
    if decided:
        (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.setattr("sg_opd.checkpoints.stops.broadcast_object_list", lambda mine: [not mine[0]])
    assert good.save().startswith(f"The last good step is 2, saved in {tmp_path}/checkpoint-2")
    assert written == ([(None, None, {"tokens": 7})] if decided else [])
