"""The sentences of a report: its lead, its main findings, and the protocol of the measurement."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from accelkit.bench.report.document import enumerated, percent, plural, significant
from accelkit.bench.report.findings import (
    ENOUGH_ROUNDS,
    EQUAL,
    EQUAL_TIME,
    FULL,
    HIGHER,
    LOWER,
    SAME,
    Findings,
    Row,
    grouped,
    label,
    setting,
    verdict,
)
from accelkit.metrics.inception_score import SPLIT_IMAGES
from accelkit.metrics.kid import SUBSET_IMAGES, SUBSETS
from accelkit.noise.axis import level_of_log_snr

Point = tuple[str, str]

_HALF_NOISE = float(level_of_log_snr(np.zeros(())))
"""The noise level with as much noise as data."""
_COMPARED = {LOWER: "lower than", SAME: "not distinguishable from", EQUAL: "equal to"}
_VERDICTS = {
    LOWER: "Better than fewer steps",
    SAME: "As good as fewer steps",
    EQUAL: "As good as fewer steps",
    HIGHER: "Worse than fewer steps",
}


def lead(results: dict[str, Any], findings: Findings) -> str:
    """Return the sentence under the title: what was compared, and where and when."""
    protocol = results["protocol"]
    methods = dict.fromkeys(label(row) for row in results["rows"])
    samplers = enumerated([f"{name.upper()} {steps}" for name, steps in findings.settings])
    machine = protocol["machine"]
    if protocol["extractor"] is None:
        size = plural(protocol["timing"]["batch_size"], "image")
        made = f"batches of {size} per row, timed without quality figures,"
    else:
        made = f"{plural(protocol['images'], 'image')} per row"
    return (
        f"{plural(len(methods), 'method')} with {samplers}: {made} from the same seeds, on "
        f"{machine['gpu'] or machine['processor']}, {protocol['created'][:10]}."
    )


def summary(results: dict[str, Any], findings: Findings) -> list[Point]:
    """Return the main findings and cautions, each with its subject."""
    points: list[Point] = []
    for sampler, steps in findings.settings:
        points += _best_saving(findings, sampler, steps)
    points += _against_fewer_steps(findings)
    points += _skipped(findings)
    points += _cautions(results, findings)
    return points


def _best_saving(findings: Findings, sampler: str, steps: int) -> list[Point]:
    """Return what saves the most of a setting's full depth; fewer steps are included."""
    full = findings.full(sampler, steps)
    if full is None or not full["seconds"] or len(findings.of(sampler)) == 1:
        return []
    about = f"{sampler.upper()} {steps}"
    if full["fid"] is None:
        rows = [r for r in findings.of(sampler) if r["seconds"] is not None]
        rows = [row for row in rows if findings.base(row) is full]
        without = ""
    else:
        rows, without = findings.scored(sampler), " without a distinguishable loss of FID"
    rows = [row for row in rows if _surely_saves(findings, row, full)]
    as_good = [r for r in rows if full["fid"] is None or verdict(r, full) != HIGHER]
    if not as_good:
        text = f"Nothing saves time{without}."
        return [(about, text + (_best_trade(findings, rows, full) if rows else ""))]
    best = max(as_good, key=lambda row: findings.saved(row, full))
    text = f"{_named(best, full)} saves the most time{without}: {_saved(findings, best, full)}."
    if full["fid"] is None:
        return [(about, f"{text} Quality was not measured.")]
    fids = significant(best["fid"]), significant(full["fid"])
    compared = _COMPARED[verdict(best, full)]
    return [(about, f"{text} Its FID of {fids[0]} is {compared} full depth's {fids[1]}.")]


def _surely_saves(findings: Findings, row: Row, full: Row) -> bool:
    """Return whether a row saves time beyond the noise, where the noise is known."""
    paired = findings.base(row) is full and row["saving_interval"] is not None
    return (row["saving_interval"][0] if paired else findings.saved(row, full)) > 0


def _best_trade(findings: Findings, rows: list[Row], full: Row) -> str:
    best = min(rows, key=lambda row: findings.seconds(row) * row["fid"])
    return (
        f" The best trade-off (lowest time × FID) is {_named(best, full)}, which saves "
        f"{_saved(findings, best, full)} at a FID of {significant(best['fid'])} against full "
        f"depth's {significant(full['fid'])}."
    )


def _named(row: Row, full: Row) -> str:
    return label(row) + (f" in {row['steps']} steps" if row["steps"] != full["steps"] else "")


def _saved(findings: Findings, row: Row, full: Row) -> str:
    text = percent(findings.saved(row, full))
    if findings.base(row) is not full or row["saving_interval"] is None:
        return text
    low, high = map(percent, row["saving_interval"])
    return f"{text} ({findings.interval} {low} to {high})"


def _against_fewer_steps(findings: Findings) -> list[Point]:
    found: dict[str, list[Row]] = {about: [] for about in _VERDICTS.values()}
    for sampler in findings.samplers:
        for row in findings.scored(sampler):
            other = findings.same_time(row) if label(row) != FULL else None
            if other is not None:
                found[_VERDICTS[verdict(row, other)]].append(row)
    return [
        (about, f"By FID at equal time (within {EQUAL_TIME:.0%}): {grouped(rows)}.")
        for about, rows in found.items()
        if rows
    ]


def _skipped(findings: Findings) -> list[Point]:
    reasons: dict[str, list[Row]] = {}
    for row in findings.skipped:
        reasons.setdefault(row["skipped"], []).append(row)
    return [("Skipped", f"{grouped(rows)}: {reason}.") for reason, rows in reasons.items()]


def _cautions(results: dict[str, Any], findings: Findings) -> list[Point]:
    protocol = results["protocol"]
    images, extractor = protocol["images"], protocol["extractor"]
    if extractor is None:
        return [("Quality", "Not measured, because no feature extractor was given for this data.")]
    texts = []
    if images <= extractor["dim"]:
        texts.append(
            f"{plural(images, 'image')} per row cannot determine a covariance of "
            f"{extractor['dim']:,} features: do not compare these FIDs with those of other reports."
        )
    scored = [row for row in findings.rows if row["fid"] is not None]
    pairs = [(a, b) for a, b in combinations(scored, 2) if setting(a) == setting(b)]
    tied = sum(verdict(a, b) == SAME for a, b in pairs)
    if tied:
        texts.append(
            f"{images:,} images per row are too few to distinguish {tied:,} of "
            f"{plural(len(pairs), 'pair')} of methods by FID."
        )
    levels = protocol.get("first_levels", {})
    late = [
        setting(r) for r in scored if levels.get(f"{r['sampler']}:{r['steps']}", 1.0) < _HALF_NOISE
    ]
    if late:
        texts.append(
            f"The figures of {enumerated(list(dict.fromkeys(late)))} mean nothing: diffusers "
            "spaces the timesteps such that the first network call gets pure noise at the noise "
            "level of nearly clean images."
        )
    if any(not row["fid_jackknife"] for row in scored):
        texts.append("Some FIDs have no jackknife, so their differences may be noise.")
    return [("Caution", " ".join(texts))] if texts else []


def protocol_facts(results: dict[str, Any], findings: Findings) -> list[Point]:
    """Return everything needed to repeat the measurement, each with its name."""
    protocol = results["protocol"]
    model, machine = protocol["model"], protocol["machine"]
    revision = f" at revision {model['revision']}" if model["revision"] else ""
    channels = protocol["guidance_channels"]
    guided = f" on the first {channels} channels" if channels is not None else ""
    packages = [f"{name} {version}" for name, version in machine["packages"].items() if version]
    missing = [name for name, version in machine["packages"].items() if not version]
    commit = f", commit {protocol['commit']}" if protocol.get("commit") else ""
    steps = [f"{name.upper()} in {steps} steps" for name, steps in findings.settings]
    return [
        ("Command", protocol["command"]),
        ("Run", f"{protocol['created']}, accelkit {protocol['accelkit']}{commit}"),
        (
            "Model",
            f"{model['name']}{revision}: {model['class']}, {plural(model['blocks'], 'block')}, "
            f"{model['parameters']:,} parameters, {model['dtype']}",
        ),
        ("Tuned weights", _tuned(protocol)),
        ("Data", _images(protocol["data"], "none given")),
        ("Samplers", enumerated(steps)),
        ("Images", _generated(protocol)),
        (
            "Labels",
            f"{protocol['classes']:,} classes or prompts, {protocol['labels']}"
            if protocol["classes"] != 1
            else "the same for all images: none, or one class or prompt",
        ),
        ("Guidance", f"{protocol['guidance']:g}{guided}"),
        ("Kernels", _kernels(protocol["kernels"])),
        ("Rounding", protocol["rounding"]),
        ("Feature extractor", _extractor(protocol["extractor"])),
        ("Reference", _images(protocol["reference"], "none, so there are no quality figures")),
        ("Statistics", _statistics(results["rows"])),
        ("Timing", _timing(protocol["timing"])),
        (
            "Processor",
            f"{machine['processor']}, {machine['threads']} threads"
            + (f" on {plural(machine['cores'], 'core')}" if machine["cores"] else ""),
        ),
        ("GPU", f"{machine['gpu']}, CUDA {machine['cuda']}" if machine["gpu"] else "none"),
        ("System", f"{machine['system']}, Python {machine['python']}"),
        (
            "Packages",
            ", ".join(packages) + (f"; not installed: {', '.join(missing)}" if missing else ""),
        ),
    ]


def _generated(protocol: dict[str, Any]) -> str:
    if protocol["extractor"] is None:
        size = protocol["timing"]["batch_size"]
        made = f"none for quality figures; timed in batches of {size:,}"
    else:
        made = f"{protocol['images']:,} per row in batches of {protocol['batch_size']:,}"
    return f"{made}; seeds count up from {protocol['seed']} and are the same in every row"


def _kernels(kernels: str) -> str:
    if kernels == "off":
        return "off: all rows run the model's own modules"
    return (
        f"{kernels}: full depth and schedules run fused kernels where available; caches, token "
        "merging and torch.compile run the model's own modules. Their time saved is against fused "
        "full depth, so it is smaller by what fusion saves"
    )


def _timing(timing: dict[str, Any]) -> str:
    enough = timing["rounds"] >= ENOUGH_ROUNDS
    kind = "a 95% interval" if enough else "about the range, as the rounds are too few for 95%"
    return (
        f"{plural(timing['rounds'], 'round')} of a batch of {timing['batch_size']:,}, "
        f"{timing['order']}; {timing['clock']}; warm-up: {timing['warmup']}. Time saved: 1 minus "
        "the median over rounds of the ratio to full depth's time. Its interval comes from the "
        f"bootstrap of that median: {kind}"
    )


def _statistics(rows: list[Row]) -> str:
    """Return how figures of quality are computed, and when two FIDs differ."""
    groups = [len(row["fid_jackknife"]) for row in rows if row["fid_jackknife"]]
    texts = []
    if groups:
        texts.append(
            "two FIDs are distinguishable if they differ at 95% confidence by the paired jackknife "
            f"over {max(groups)} groups of images, with Student's t; the same groups give the "
            "standard error (SE) of a FID. Without a jackknife, or with different numbers of "
            "images, any difference counts"
        )
    used = sorted({row["manifold_images"] for row in rows if row["manifold_images"]})
    if used:
        texts.append(
            "precision, recall, density and coverage use the 3 nearest neighbours among "
            f"{enumerated([f'{n:,}' for n in used])} images on either side"
        )
    if any(row["kid"] is not None for row in rows):
        texts.append(
            f"KID: mean and SD over {SUBSETS} random subsets of {SUBSET_IMAGES:,} images, or of "
            "half the images of the smaller set if these are fewer"
        )
    if any(row["inception_score"] is not None for row in rows):
        texts.append(
            f"Inception Score: mean and SD over splits of {SPLIT_IMAGES:,} images, or over all "
            "images if there are fewer"
        )
    return "; ".join(texts) or "none, as there are no quality figures"


def _tuned(protocol: dict[str, Any]) -> str:
    if protocol["tuned_for"] is None:
        return "none"
    settings = [f"{name} {value}" for name, value in (protocol["training"] or {}).items()]
    return f"tuned for {protocol['tuned_for']}" + (f": {', '.join(settings)}" if settings else "")


def _extractor(extractor: dict[str, Any] | None) -> str:
    if extractor is None:
        return "none, so there are no quality figures"
    return (
        f"{extractor['name']}, version {extractor['version']}, {extractor['dim']:,} features, "
        f"resize: {extractor['resize']}; SHA-256 {extractor['sha256']}"
    )


def _images(source: dict[str, Any] | None, otherwise: str) -> str:
    """Describe a set of images or their statistics."""
    if source is None:
        return otherwise
    size = "size unknown" if source["n"] is None else plural(source["n"], "image")
    kind = f", {source['kind']}" if "kind" in source else ""
    return f"{source['name']}, {size}{kind}; SHA-256 {source['fingerprint']}"
