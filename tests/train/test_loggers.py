"""What a run tells TensorBoard, W&B and MLflow, read back by their own readers; and that none of them can harm it."""

import csv
import json
import struct
import time
from pathlib import Path

import pytest
from stops import ctrl_c_in_step

from litfreeze.__main__ import main
from litfreeze.data.args import DataArgs
from litfreeze.demo import TRAIN_FILE
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.train import aside
from litfreeze.train.args import EvalArgs, LogArgs, TrainArgs

TRAIN = TrainArgs(max_steps=6, global_batch_size=8, save_interval=2, watch_interval=3)
EVAL = EvalArgs(max_samples=8, interval=2, max_new_tokens=2)


@pytest.fixture
def records(tmp_path) -> Path:
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:32]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "records.jsonl"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return pytest.importorskip("wandb")


@pytest.fixture
def client(tmp_path, monkeypatch):
    """MLflow's own, of a store that is there for this test alone."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.tracking.MlflowClient(uri)


def run(out_dir: Path, records: Path, **options):
    options = {"trainable_layers": "11", "train": TRAIN, "eval": EVAL, "data": DataArgs(path=records), **options}
    return finetune_full(out_dir=out_dir, **options)


def interrupted_then_resumed(out_dir: Path, records: Path, **options):
    """A run that is left in step 6, so that it goes on behind step 4 and makes step 5 again."""
    with ctrl_c_in_step(6), pytest.raises(KeyboardInterrupt):
        run(out_dir, records, **options)
    time.sleep(1)  # TensorBoard reads its files in the order of the seconds in their names
    return finetune_full(resume=out_dir)


def table(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """A column of metrics.csv by step."""
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(lines) if row[name]]


def test_mlflow_has_what_the_table_has(tmp_path, records, client):
    result = run(tmp_path / "run", records, logger_name="mlflow", log=LogArgs(project="intents", run="two blocks"))
    [found] = client.search_runs([client.get_experiment_by_name("intents").experiment_id])
    assert (found.info.run_name, found.info.status) == ("two blocks", "FINISHED")
    for name in ("train_loss", "val_loss", "lr", "grad_norm"):
        told = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        assert told == table(tmp_path / "run", name), name
    assert [one.step for one in client.get_metric_history(found.info.run_id, "drift/blocks/11")] == [1, 3, 6]
    assert found.data.metrics["after/loss"] == result.outcome.after.loss
    assert found.data.metrics["before/loss"] == result.outcome.before.loss
    assert found.data.params.items() >= {"trainable_layers": "11", "train.max_steps": "6", "layers": "11"}.items()
    assert found.data.params["data.path"] == "records.jsonl" and str(tmp_path) not in str(found.data)


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path, records, client):
    interrupted_then_resumed(tmp_path / "run", records, logger_name="mlflow")
    [found] = client.search_runs([client.get_experiment_by_name("litfreeze").experiment_id])
    assert found.info.status == "FINISHED"
    for name in ("train_loss", "val_loss"):  # none is missing, none there twice
        told = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        assert told == table(tmp_path / "run", name), name


def test_a_resumed_run_may_leave_its_logger(tmp_path, records, client):
    log = LogArgs(project="intents")
    with ctrl_c_in_step(6), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", records, logger_name="mlflow", log=log)
    finetune_full(resume=tmp_path / "run", logger_name="csv")
    [found] = client.search_runs([client.get_experiment_by_name("intents").experiment_id])
    assert found.info.status == "FAILED" and "after/loss" not in found.data.metrics
    assert [step for step, _ in table(tmp_path / "run", "train_loss")] == [1, 2, 3, 4, 5, 6]


def wandb_records(file: Path) -> list:
    """What a .wandb file holds: records in blocks of 32 KiB, as LevelDB's log has them, behind 7 bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a record's head
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of it
            found.append(Record.FromString(part))
            part = b""
    return found


def history(records: list) -> list[dict]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_has_what_the_table_has_and_a_resumed_run_goes_on_in_it(tmp_path, records, offline, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    run_dir = tmp_path / "run"
    log = LogArgs(project="intents", group="blocks")
    result = interrupted_then_resumed(run_dir, records, logger_name="wandb", log=log)
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # one id
    parts = [wandb_records(file) for file in files]
    rows = [row for part in parts for row in history(part)]
    for name in ("train_loss", "val_loss", "lr"):
        assert [(row["step"], row[name]) for row in rows if name in row] == table(run_dir, name), name
    assert [row["step"] for row in rows if "drift/blocks/11" in row] == [1, 3, 6]
    began = next(record.run for record in parts[0] if record.WhichOneof("record_type") == "run")
    assert (began.project, began.run_group, began.display_name) == ("intents", "blocks", "run")
    settings = {item.key: json.loads(item.value_json) for item in began.config.update}
    assert settings["trainable_layers"] == "11" and settings["train.max_steps"] == 6
    summed_up = [record.summary.update for record in parts[1] if record.WhichOneof("record_type") == "summary"]
    written = {item.key or item.nested_key[0]: json.loads(item.value_json) for items in summed_up for item in items}
    assert written["after/loss"] == result.outcome.after.loss
    for file in files:
        content = file.read_bytes()
        assert b"0123456789" * 4 not in content and str(tmp_path).encode() not in content


def test_a_logger_that_breaks_is_told_once_and_the_run_goes_on(tmp_path, records, client, capsys, monkeypatch):
    from mlflow.tracking import MlflowClient

    def broken(self, run_id, metrics=(), params=()):
        if metrics:
            raise ConnectionError("the server is gone\nand more")

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    run(tmp_path / "run", records, logger_name="mlflow")
    told = capsys.readouterr().out
    assert told.count("MLflow takes no more of this run: the server is gone. metrics.csv has all.") == 1
    assert len(table(tmp_path / "run", "train_loss")) == 6


def test_a_logger_that_hangs_is_left(tmp_path, records, client, capsys, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(MlflowClient, "create_run", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr("litfreeze.train.run.PATIENCE", 0.1)
    began = time.monotonic()
    run(tmp_path / "run", records, logger_name="mlflow")
    assert time.monotonic() - began < 40
    assert "MLflow has not taken all within 0.1 s" in capsys.readouterr().out


def test_a_wandb_server_that_is_away_leaves_files(tmp_path, records, offline, capsys, monkeypatch):
    begin = offline.init

    def init(mode=None, **options):
        if mode != "offline":
            raise offline.errors.CommError("connection refused\n/a/path")
        return begin(mode=mode, **options)

    monkeypatch.setattr("wandb.init", init)
    run(tmp_path / "run", records, logger_name="wandb")
    told = capsys.readouterr().out
    assert told.count("W&B: connection refused. What it would get is kept: wandb sync ") == 1
    [file] = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert len([row for row in history(wandb_records(file)) if "train_loss" in row]) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--log.project", "a"], "error: --log.project a is for --logger_name wandb or mlflow."),
        (["--logger_name", "mlflow", "--log.group", "a"], "error: --log.group a: MLflow has no groups"),
        (["--logger_name", "weights"], "'weights' is not one of auto, csv, tensorboard, wandb, mlflow"),
    ],
)
def test_wrong_words_are_told_before_the_run(tmp_path, records, capsys, words, told):
    line = ["finetune", "full", "--data", str(records), "--out_dir", str(tmp_path / "run"), *words]
    assert main(line) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_nobody_logged_in_is_told_before_the_run(tmp_path, records, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    monkeypatch.setattr(wandb, "setup", lambda: type("S", (), {"settings": type("M", (), {"mode": "online"})}))
    with pytest.raises(UsageError, match="nobody is logged in to W&B"):
        run(tmp_path / "run", records, logger_name="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_its_extra(tmp_path, records, monkeypatch, name):
    monkeypatch.setattr(aside, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=rf"pip install 'litfreeze\[{name}\]'"):
        run(tmp_path / "run", records, logger_name=name)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path, records):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_then_resumed(tmp_path / "run", records)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    told = [(one.step, pytest.approx(one.value, rel=1e-6)) for one in events.Scalars("train_loss")]
    assert told == table(tmp_path / "run", "train_loss")


def test_csv_alone(tmp_path, records):
    run(tmp_path / "run", records, logger_name="csv")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "metrics.csv" in names and not names & {"tensorboard", "wandb", "logger.json"}
