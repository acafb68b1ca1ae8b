"""What tests of several jobs start from: a cache of their own, and a small model in a directory."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
