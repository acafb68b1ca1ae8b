"""Cost of a schedule that keeps every block, relative to sampling without a schedule."""

from accelkit.artifact.artifact import from_pretrained
from accelkit.runtime.switch import enable
from accelkit.sample.generate import Sampling, generate
from benchmarks.common import interleaved, parser, ratio, record


def main() -> None:
    options = parser(__doc__, rounds=15).parse_args()
    plain, full = from_pretrained("builtin"), from_pretrained("builtin")
    enable(full, "full", kernels="off")
    how = Sampling("ddim", 50)
    results = {}
    for batch in (1, 16):
        labels = [i % 10 for i in range(batch)]
        work = {
            "full": lambda labels=labels: generate(full, labels, list(range(len(labels))), how),
            "plain": lambda labels=labels: generate(plain, labels, list(range(len(labels))), how),
        }
        results[f"batch {batch}"] = ratio(interleaved(work, options.rounds), "full", "plain")
    protocol = {"model": "builtin", "sampler": "ddim:50", "ratio": "full schedule / no schedule"}
    record("benchmarks.full_schedule", protocol, results, options.output)


if __name__ == "__main__":
    main()
