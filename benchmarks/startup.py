"""How long `litfreeze --help` takes, as whole processes: python benchmarks/startup.py [runs]

The first row is the interpreter alone, the floor under the others."""

import statistics
import subprocess
import sys
import time

COMMANDS = [
    ["-c", "pass"],
    ["-m", "litfreeze", "--help"],
    ["-m", "litfreeze", "finetune", "full", "--help"],
    ["-m", "litfreeze", "finetune", "full", "--trainable_layers", "-2:", "--print_config"],
    ["-m", "litfreeze", "generate", "--help"],
    ["-m", "litfreeze", "convert", "from_hf", "--help"],
]


def seconds(words: list[str]) -> float:
    """Wall time of one process; the run must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main(runs: int = 10) -> None:
    print(f"{'seconds':<62} {'median':>7} {'min':>7} {'max':>7}")
    for words in COMMANDS:
        seconds(words)  # the first run compiles and fills the disk cache
        times = [seconds(words) for _ in range(runs)]
        row = (statistics.median(times), min(times), max(times))
        print(f"{'python ' + ' '.join(words):<62} " + " ".join(f"{value:7.3f}" for value in row))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
