"""A run that is asked to stop does so after its step, keeps where it stands and says how to go on."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stops import ctrl_c_in_step
from test_resume import EVAL, METHODS, TRAIN, flip_a_byte, interrupt, log, records, weights  # noqa: F401

from litfreeze.__main__ import main
from litfreeze.data.args import DataArgs
from litfreeze.errors import Interrupted, RunError, UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.outputs import sole_user
from litfreeze.train.loop import Loop, NotFinite

ONCE = replace(TRAIN, save_interval=None)  # nothing is kept on the way but at a signal


def signalled(monkeypatch, at: int, number: int = signal.SIGTERM):
    """The signal comes in the middle of step `at`."""
    plain, taken = Loop._step, []

    def step(*given):
        taken.append(1)
        if len(taken) == at:
            signal.raise_signal(number)
        return plain(*given)

    monkeypatch.setattr(Loop, "_step", step)


@pytest.mark.parametrize("at", [3, *(pytest.param(at, marks=pytest.mark.matrix) for at in (1, 2, 6, 8))])
def test_the_step_is_finished_and_the_run_goes_on_from_it(tmp_path, records, monkeypatch, capsys, at):  # noqa: F811
    """Whether a validation is due after it (3, 6) or not, and after the last one."""
    script, own = METHODS["lora"]
    words = {"train": ONCE, "eval": EVAL, "data": DataArgs(path=records), **own}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script(out_dir=whole, **words)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        signalled(patch, at)
        script(out_dir=cut, **words)
    assert stop.value.exit_code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    told = capsys.readouterr()
    assert f"--resume {cut}" in told.out and "Stopping after this step" in told.err
    assert [path.name for path in (cut / "resume").iterdir()] == [f"step-{at:06d}"]
    script(resume=cut)
    assert f"Resumed after step {at} of 8" in capsys.readouterr().out
    ours, twins = weights(cut / "final"), weights(whole / "final")
    assert all(torch.equal(ours[name], twins[name]) for name in twins)
    assert log(cut) == log(whole)


def test_a_point_made_twice_validates_once(tmp_path, records, monkeypatch):  # noqa: F811
    """Stopped before a validation was due, killed after it, and stopped again."""
    script, own = METHODS["lora"]
    words = {"train": ONCE, "eval": EVAL, "data": DataArgs(path=records), **own}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script(out_dir=whole, **words)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signalled(patch, 3)
        script(out_dir=cut, **words)
    with ctrl_c_in_step(1), pytest.raises(KeyboardInterrupt):
        script(resume=cut)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signalled(patch, 2)
        script(resume=cut)
    script(resume=cut)
    assert log(cut) == log(whole)


def test_a_second_signal_leaves_at_once(tmp_path, records, monkeypatch):  # noqa: F811
    script, own = METHODS["lora"]

    def step(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        script(out_dir=tmp_path / "cut", train=TRAIN, eval=EVAL, data=DataArgs(path=records), **own)
    assert not (tmp_path / "cut/resume").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_from_the_command_line(tmp_path, number, code):
    words = ["--out_dir", str(tmp_path / "run"), "--train.max_steps", "10000", "--train.log_interval", "1",
             "--eval.interval", "10000", "--trainable_layers", "11", "--cache", "off"]  # fmt: skip
    command = [sys.executable, "-m", "litfreeze", "finetune", "full", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        metrics = tmp_path / "run/metrics.csv"
        while run.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
            time.sleep(0.05)
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert err.splitlines()[-1] == f"stopped by {number.name}" and "Traceback" not in err
    assert f"Go on with: litfreeze finetune full --resume {tmp_path / 'run'}" in out
    assert len(list((tmp_path / "run/resume").glob("step-*"))) == 1


# --- what is damaged, and who else is there ---


MATRIX = pytest.mark.matrix  # more of the same


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("state.safetensors", "flipped"),
        *(pytest.param("state.safetensors", how, marks=MATRIX) for how in ("cut short", "emptied", "gone")),
        *(pytest.param("resume.json", how, marks=MATRIX) for how in ("cut short", "flipped", "emptied", "gone")),
    ],
)
def test_a_damaged_point_is_passed_over_and_told(tmp_path, records, monkeypatch, capsys, file, how):  # noqa: F811
    script, own = METHODS["lora"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script(out_dir=whole, train=TRAIN, eval=EVAL, data=DataArgs(path=records), **own)
    interrupt("lora", cut, records)
    place = cut / "resume/step-000004" / file
    size = place.stat().st_size
    {
        "flipped": lambda: flip_a_byte(place),
        "cut short": lambda: place.write_bytes(place.read_bytes()[: size // 2]),
        "emptied": lambda: place.write_bytes(b""),
        "gone": place.unlink,
    }[how]()
    assert main(["verify", str(cut)]) == 1
    told = capsys.readouterr()
    assert "1 of 5 damaged" in told.err and "damaged   " + str(cut / "resume/step-000004") in told.out
    script(resume=cut)
    told = capsys.readouterr().out
    assert "Resumed after step 2 of 8" in told and f"Passed    {cut / 'resume/step-000004'}" in told
    assert log(cut) == log(whole)
    ours, twins = weights(cut / "final"), weights(whole / "final")
    assert all(torch.equal(ours[name], twins[name]) for name in twins)


def test_two_runs_do_not_share_a_folder(tmp_path, records, monkeypatch, capsys):  # noqa: F811
    interrupt("lora", tmp_path / "cut", records)
    with sole_user(tmp_path / "cut") as before:
        assert before is None
        for words in ({"resume": tmp_path / "cut"}, {"resume": "auto", "out_dir": tmp_path / "cut"}):
            with pytest.raises(UsageError, match=r"in use by process \d+ on "):
                finetune_lora(**words)
    (tmp_path / "cut/.running").write_text("process 12 on node7")  # as a killed one leaves it
    finetune_lora(resume=tmp_path / "cut")
    assert "process 12 on node7, was killed" in capsys.readouterr().out
    assert not (tmp_path / "cut/.running").exists()


# --- jobs that may be put back in a queue ---


def test_auto_begins_goes_on_and_says_when_it_is_done(tmp_path, records, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "full", "--trainable_layers", "rank:random:2", "--data", records.name, "--out_dir", "run",
             "--train.max_steps", "6", "--train.save_interval", "2", "--train.lr", "1e-3", "--eval.interval", "3",
             "--eval.max_samples", "4", "--eval.max_new_tokens", "1", "--resume", "auto"]  # fmt: skip

    def killed(at: int) -> None:
        with ctrl_c_in_step(at):
            assert main(words) == 130

    killed(2)  # before anything was kept but the recipe
    killed(4)
    assert "Resumed" not in capsys.readouterr().out
    assert main(words) == 0
    assert "Resumed after step 2 of 6" in capsys.readouterr().out
    assert main(words) == 2
    assert "It is finished" in capsys.readouterr().err
    assert main([*words, "--out_dir", "other", "--resume", "run"]) == 2


def test_auto_does_not_begin_over_another_run(tmp_path, records, capsys):  # noqa: F811
    words = {"eval": EVAL, "data": DataArgs(path=records), "out_dir": tmp_path / "run", "resume": "auto"}
    with ctrl_c_in_step(1), pytest.raises(KeyboardInterrupt):
        finetune_full(trainable_layers="11", train=replace(ONCE, max_steps=3), **words)
    (tmp_path / "run/best").mkdir()  # of a run that got further
    with pytest.raises(UsageError, match="already holds something"):
        finetune_full(trainable_layers="10", train=replace(ONCE, max_steps=3), **words)
    finetune_full(trainable_layers="11", train=replace(ONCE, max_steps=3), **words)


# --- losses that are no numbers, disks that are full ---


def broken(monkeypatch, at: list[int]) -> None:
    """The loss of these steps (from 1) is not a number, as a record may make it."""
    plain, taken = Loop._step, []

    def step(loop, ready, *given):
        taken.append(1)
        if len(taken) in at:
            weight = ready.model.module.gpt.final_norm.weight  # frozen, so that nothing keeps it
            kept = weight.data.clone()
            weight.data.fill_(float("nan"))
            try:
                return plain(loop, ready, *given)
            finally:
                weight.data.copy_(kept)
        return plain(loop, ready, *given)

    monkeypatch.setattr(Loop, "_step", step)


def test_a_loss_that_is_no_number_ends_the_run_with_its_records(tmp_path, records, monkeypatch, capsys):  # noqa: F811
    broken(monkeypatch, [3])
    script, own = METHODS["full"]
    with pytest.raises(RunError, match=r"Step 3: the loss became nan in the records \S+records.jsonl:\d+, ") as told:
        script(out_dir=tmp_path / "run", train=TRAIN, eval=EVAL, data=DataArgs(path=records), **own)
    assert len(str(told.value).split("records.jsonl:")) == 1 + 8  # those of the micro-batch, not of the whole step
    out = capsys.readouterr().out
    assert f"Kept in {tmp_path / 'run'}: best, step-000002" in out or "step-000002" in out
    assert f"--resume {tmp_path / 'run'}" in out


def test_or_is_skipped_and_changes_nothing(tmp_path, records, monkeypatch, capsys):  # noqa: F811
    """Weights and moments after a skipped step are those before it: a run whose other steps are at a rate of 0 ends
    where it began."""
    broken(monkeypatch, [2, 4])
    script, own = METHODS["full"]
    train = replace(TRAIN, nonfinite="skip", watch_interval=1, save_interval=None)
    result = script(out_dir=tmp_path / "run", train=train, eval=EVAL, data=DataArgs(path=records), **own)
    out = capsys.readouterr().out
    assert "Skipped   step 2: the loss became nan in the records" in out and "Skipped   step 4" in out
    assert result.outcome.step == 8 and result.outcome.after.loss < result.outcome.before.loss
    looked = {row.split(",")[0] for row in (tmp_path / "run/blocks.csv").read_text().splitlines()[1:]}
    assert looked == {"1", "3", "5", "6", "7", "8"}


def test_ten_in_a_row_end_it(tmp_path, records, monkeypatch):  # noqa: F811
    broken(monkeypatch, list(range(2, 20)))
    script, own = METHODS["full"]
    train = replace(TRAIN, nonfinite="skip", max_steps=16, save_interval=None)
    with pytest.raises(RunError, match="Step 11: the loss became nan"):
        script(out_dir=tmp_path / "run", train=train, eval=EVAL, data=DataArgs(path=records), **own)


def test_a_skipped_step_leaves_weights_and_moments(tmp_path, records, monkeypatch):  # noqa: F811
    script, own = METHODS["full"]
    words = {"eval": EVAL, "data": DataArgs(path=records), **own}
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", lambda *_: (_ for _ in ()).throw(NotFinite("it did.", float("nan"))))
        train = replace(TRAIN, nonfinite="skip", max_steps=2)
        script(out_dir=tmp_path / "run", train=train, save_dtype="float32", **words)
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.demo import MODEL_DIR

    ours, base = open_checkpoint(tmp_path / "run/final"), open_checkpoint(MODEL_DIR)
    assert all(ours.read(name).equal(base.read(name).float()) for name in base.layout())


def test_a_disk_without_room_is_told_before_the_run(tmp_path, records, monkeypatch):  # noqa: F811
    script, own = METHODS["full"]
    usage = type("Usage", (), {"free": 12_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        UsageError, match=r"12.0 MB are free there, and this run keeps up to \S+ MB: \S+ MB for the final"
    ):
        script(out_dir=tmp_path / "run", train=TRAIN, eval=EVAL, data=DataArgs(path=records), **own)
    assert not Path(tmp_path / "run/step-000002").exists()
