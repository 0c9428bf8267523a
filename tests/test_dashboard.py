"""A sweep as an Optuna study, opened in optuna-dashboard: its server, and its page in a browser."""

import contextlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from gradhpo.cluster import shard
from gradhpo.cluster.optuna_study import export_study
from tests import file_operations
from tests.sweeps import sweep

pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (extra test)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of other people's packages
]
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ALONE = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
SERVE = """
import sys
from optuna_dashboard import run_server
run_server(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]))
"""
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A sweep of a few lines of NumPy and its study, and the address at which a server shows it."""
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "Variant", file_operations.Variant)
        result = sweep(folder / "digits", generations=4).run()
    study = export_study(folder / "digits", f"sqlite:///{folder}/study.db")
    with served(f"sqlite:///{folder}/study.db") as address:
        yield result, study, address


@contextlib.contextmanager
def served(url):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, url, str(port)], stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def asked(url):
    with LOCAL.open(url, timeout=60) as answer:
        return json.load(answer)


def test_the_server_tells_of_the_sweep_what_its_table_says(exported):
    result, study, address = exported
    (summary,) = asked(f"{address}/api/studies")["study_summaries"]
    assert summary["study_name"] == "digits"
    number = summary["study_id"]
    told = asked(f"{address}/api/studies/{number}")
    assert len(told["trials"]) == len(study.trials) == len(set(result.table["trial"].tolist()))
    losses = {}
    for trial, score in zip(result.table["trial"], result.table["val_loss"], strict=True):
        losses.setdefault(int(trial), []).append(float(score))
    for trial in told["trials"]:
        steps = [one["value"] for one in trial["intermediate_values"]]
        assert steps == pytest.approx(losses[trial["number"]])
    assert {trial["state"] for trial in told["trials"]} == {"Complete", "Pruned"}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian's: chromium)")
def test_a_browser_shows_the_study_and_its_trials(exported, tmp_path):
    _, study, address = exported
    number = asked(f"{address}/api/studies")["study_summaries"][0]["study_id"]
    best = study.best_trial
    shown = page(f"{address}/dashboard/studies/{number}/trials?numbers={best.number}", tmp_path)
    assert f"digits (id={number})" in shown
    assert f"{len(study.trials)} Trials" in shown
    assert f"Trial {best.number} (trial_id=" in shown
    assert f"Value {best.value:.6f}"[:12] in shown
    assert f"Parameter log_rate {best.params['log_rate']:.9f}"[:26] in shown
    assert {"Complete", "Pruned"} <= set(shown.split())


def page(url, folder):
    """Return the words of a page that a browser shows, when it has asked for what it needs."""
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={folder}"]
    command += [f"--disable-{what}" for what in ALONE]
    command += ["--virtual-time-budget=30000", "--dump-dom", url]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    body = re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", body).split()))
