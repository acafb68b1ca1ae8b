"""``accelkit reproduce`` from the command line."""

import json
from pathlib import Path

import pytest

from accelkit.jobs import reproduce as job
from accelkit.jobs.published import names


def test_alone_it_lists_all_there_are(main):
    status, out, errors = main("reproduce")
    assert (status, errors) == (0, [])
    assert all(f" {name} " in out for name in names())
    assert "A Simple Early Exiting Framework" in out
    status, out, _ = main("reproduce", "--json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(names())
    assert rows[0].keys() == {"name", "source", "title", "needs"}


def test_costs_are_counted_at_once(main):
    status, out, errors = main("reproduce", "dvd-table-a2", "--json")
    assert (status, errors) == (0, [])
    rows = {row["depth"]: row for row in json.loads(out)["counted"] if "depth" in row}
    assert rows[28]["gmacs"] == 114.78
    assert rows[28]["gmacs_counted"] == pytest.approx(114.39, abs=0.01)
    assert "114.78" in main("reproduce", "dvd-table-a2")[1]


def test_a_dry_run_shows_settings_figures_and_notes(main):
    status, out, errors = main("reproduce", "ase-table3", "--scale", "digits", "--dry-run")
    assert (status, errors) == (0, [])
    for words in ("Moon et al. 2024, table 3", "ddim:25", "8.679", "0.3046", "0.28571", "RTX 3090"):
        assert words in out
    assert list(Path().iterdir()) == []
    shown = json.loads(main("reproduce", "dvd-table6", "--dry-run", "--json")[1])
    assert shown["source"] == "DvD 2025, table 6"
    assert shown["full"]["images"] == 50000
    assert shown["figures"][0]["fid"] == 43.47


def test_what_is_given_goes_to_the_job(main, monkeypatch):
    calls = []
    monkeypatch.setattr(job, "reproduce", lambda *given: calls.append(given) or {"": {}})
    options = ["--model", "m", "--data", "d", "--tuned", "D4=runs/d4, D6=runs/d6"]
    options += ["--vae", "v", "--num-heads", "2", "--reference", "r.npz", "--kernels", "off"]
    status, _, errors = main("reproduce", "ase-table3", *options)
    assert (status, errors) == (0, [])
    ((read, scale, source, given, output, _),) = calls
    assert (read.name, scale, output) == (
        "ase-table3",
        "full",
        Path("runs/reproduce/ase-table3-full"),
    )
    assert (source.model, source.data, source.vae, source.num_heads) == ("m", "d", "v", 2)
    assert given.tuned == {"D4": "runs/d4", "D6": "runs/d6"}
    assert (given.kernels, given.reference, given.seed) == ("off", "r.npz", 0)
    main("reproduce", "ase-table3", *options, "--seed", "2")
    assert (calls[1][3].seed, calls[1][4].name) == (2, "ase-table3-full-seed2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ase-table9"], "no reproduction is called 'ase-table9'; did you mean ase-table"),
        (["ase-table3"], "ase-table3 needs --data"),
        (["ase-table3", "--scale", "small"], "a scale is full or digits, got 'small'"),
        (["ase-table3", "--scale", "small", "--dry-run"], "a scale is full or digits, got 'small'"),
        (
            ["ase-table3", "--tuned", "D4"],
            "--tuned takes schedules with their models, such as D4=runs/finetune-D4",
        ),
        (["dvd-table4", "--scale", "digits"], "no miniature"),
    ],
)
def test_what_is_refused(refused, arguments, words):
    assert words in refused("reproduce", *arguments)
    assert list(Path().iterdir()) == []
