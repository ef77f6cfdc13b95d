"""The embedded default: a small pretrained model and a small set of labelled utterances. CARD.md says what they are."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
TRAIN_FILE = Path(__file__).parent / "data" / "train.jsonl"
VAL_FILE = Path(__file__).parent / "data" / "validate.jsonl"

# What the demo trains with where the person did not say otherwise: its weights, or an adapter
TRAIN_DEFAULTS = {"lr": 2e-3, "epochs": 8}
