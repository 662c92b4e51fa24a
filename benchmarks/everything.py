"""Run all benchmarks one after the other and join what they say into one page.

    taskset -c 0 python benchmarks/everything.py

About 40 minutes on one core. Each script runs in a process of its own and can be run alone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OPTIONS = {"convolutions": ["--images", "5"], "precision": []}
"""Arguments of the scripts that print one table and keep nothing themselves."""
SCRIPTS = {
    "side_by_side": "How fast is a meta-step, beside PyTorch's libraries, textbook JAX and the limit of the machine?",
    "memory": "How much memory does a second-order meta-step need?",
    "scaling": "How do time and memory of a meta-step grow with tasks, inner steps, shots and width?",
    "sampler": "How many episodes a second are drawn on the device?",
    "convolutions": "Which form of a convolution whose kernels differ by task is fastest?",
    "precision": "What do products in bfloat16 cost in accuracy?",
}


def main() -> None:
    """Run them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    for name in arguments.only:
        command = [sys.executable, str(HERE / f"{name}.py")]
        if name not in OPTIONS:
            subprocess.run([*command, "--out", str(arguments.out)], check=True)
            continue
        done = subprocess.run([*command, *OPTIONS[name]], check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.md").write_text(done.stdout, encoding="utf-8")
    found = {name: arguments.out / f"{name}.md" for name in SCRIPTS}
    parts = [
        f"## {question}\n\n{found[name].read_text(encoding='utf-8').strip()}"
        for name, question in SCRIPTS.items()
        if found[name].exists()
    ]
    page = "# What the benchmarks measured\n\nBy `python benchmarks/everything.py`.\n\n" + "\n\n".join(parts) + "\n"
    (arguments.out / "README.md").write_text(page, encoding="utf-8")
    print(arguments.out / "README.md")


if __name__ == "__main__":
    main()
