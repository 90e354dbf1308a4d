"""What the application answers: pages that say what the home says, to those who may see or do it."""

from __future__ import annotations

import re

import pytest

from foedus.dashboard import ALARMS, coordinator_app, serve, silo_app
from foedus.errors import GuaranteeError, RunError

from ..report.pages import Page
from .client import Client
from .homes import federation, silo, write_json

TOKEN = "a-token-that-is-long-enough"
HERE = {"origin": "http://localhost"}


@pytest.fixture
def home(tmp_path):
    return federation(tmp_path / "home", loss=[3.0, 2.5, 2.2, 2.1], perplexity=[90.0, 80.0, 75.0, 70.0])


@pytest.fixture
def done() -> list[str]:
    return []


@pytest.fixture
def app(home, done, monkeypatch):
    from foedus.dashboard import view
    from foedus.dashboard.released import Version

    kept = (
        Version("notes", 2, "production", "ef" * 32, rounds=6),
        Version("notes", 1, "retired", "ab" * 32, rounds=4, returns=True),
    )
    monkeypatch.setattr(view, "versions", lambda *_: kept)
    return Client(coordinator_app(home, token=TOKEN, rollback=lambda version: done.append(version) or f"{version} is"))


def signed_in(app: Client) -> str:
    assert app.post("/sign-in", data={"token": TOKEN}, headers=HERE).status_code == 303
    return re.search(r'name="csrf" value="(\w+)"', app.get("/").text)[1]


def faults(text: str) -> list[str]:
    """What is wrong with a page, but for its own files and actions."""
    own = ("/static/", "data:,", "?run=", "/sign-", "/rollback")
    return [fault for fault in Page(text).faults if not any(word in fault for word in own)]


def test_the_coordinators_page_is_well_formed_and_shows_the_run(app):
    text = app.get("/").text
    assert faults(text) == []
    page = Page(text).root
    assert "4 of 6" in page.section("run").text
    assert "70" in page.section("quality").text and "wards" in page.section("quality").text
    assert "projected" in page.section("privacy").text
    assert "Verified" in page.section("ledger").text
    assert "777.125" not in text
    assert {"main", "nav", "header"} <= {tag for tag in ("main", "nav", "header") if page.all(tag)}


def test_every_plot_has_a_label_and_a_table_beside_it(app):
    page = Page(app.get("/").text).root
    for name in ("quality", "privacy"):
        assert page.section(name).all("svg") and page.section(name).all("table")
    assert all(svg.attributes.get("aria-label") for svg in page.all("svg"))


def test_a_silos_page_is_well_formed_and_for_reading_only(tmp_path):
    page = Client(silo_app(silo(tmp_path / "home")))
    text = page.get("/").text
    assert faults(text) == []
    assert "max_rank allows at most 16" in text and "gives what its treaties say" in text
    assert "<form" not in text and page.post("/rollback").status_code in (404, 405)


def test_a_paused_silos_page_says_so(tmp_path):
    assert (
        "paused: every ask is refused" in Client(silo_app(silo(tmp_path / "h", state={"paused": True}))).get("/").text
    )


def test_a_page_that_did_not_change_is_not_sent_again(app, home, monkeypatch):
    monkeypatch.setattr("foedus.dashboard.view._tick", lambda: "0")
    tag = app.get("/").headers["etag"]
    assert app.get("/", headers={"if-none-match": tag}).status_code == 304
    write_json(home / "status.json", {"superlink": {"alive": False}})
    assert "transport is down" in app.get("/", headers={"if-none-match": tag}).text


def test_what_is_not_there_has_no_page(app):
    assert app.get("/?run=nothing").status_code == 404
    assert app.get("/static/../app.py").status_code == 404
    assert app.get("/static/app.py").status_code == 404


def test_names_of_runs_and_silos_are_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    home = federation(tmp_path / "home", failures={4: {"west": evil}})
    assert evil not in Client(coordinator_app(home)).get("/").text


def test_every_answer_forbids_scripts_frames_and_foreign_sources(app):
    for answer in (app.get("/"), app.get("/metrics"), app.get("/?run=nothing"), app.post("/rollback")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"
    assert "://" not in re.sub(r"http://www\.w3\.org/\S+", "", app.get("/").text)


def test_another_name_for_this_machine_is_not_answered(app):
    assert app.get("/", headers={"host": "attacker.example"}).status_code == 400


def test_without_a_token_there_is_nothing_to_press(home):
    page = Client(coordinator_app(home, rollback=lambda version: ""))
    assert "read-only" in page.get("/").text
    assert page.post("/sign-in", data={"token": ""}, headers=HERE).status_code == 403
    assert page.post("/rollback", data={"version": "notes@1"}, headers=HERE).status_code == 403


def test_with_the_token_a_version_is_rolled_back(app, done):
    assert "Roll back to this" not in app.get("/").text
    csrf = signed_in(app)
    assert app.get("/").text.count("Roll back to this") == 1
    answer = app.post("/rollback", data={"csrf": csrf, "version": "notes@1"}, headers=HERE)
    assert (answer.status_code, done) == (303, ["notes@1"])
    assert "The rollback is done" in app.get(answer.headers["location"]).text


def test_a_form_of_another_site_changes_nothing(app, done):
    csrf = signed_in(app)
    tries = [
        ({"version": "notes@1"}, HERE),
        ({"version": "notes@1", "csrf": "0" * 64}, HERE),
        ({"version": "notes@1", "csrf": csrf}, {"origin": "http://attacker.example"}),
        ({"version": "notes@1", "csrf": csrf}, {"sec-fetch-site": "cross-site"}),
        ({"version": "notes@1", "csrf": csrf, "more": "x" * 5000}, HERE),
    ]
    assert [app.post("/rollback", data=data, headers=head).status_code for data, head in tries] == [403] * 5
    assert app.get("/rollback").status_code == 405
    assert done == []


def test_a_program_sends_the_token_itself(app, done):
    for token, status in (("wrong", 403), (TOKEN, 200)):
        said = app.post("/rollback", data={"version": "notes@1"}, headers={"authorization": f"Bearer {token}"})
        assert said.status_code == status
    assert done == ["notes@1"]


def test_the_token_cannot_be_guessed_in_a_hurry(app):
    assert [app.post("/sign-in", data={"token": "x"}, headers=HERE).status_code for _ in range(6)] == [403] * 5 + [429]
    assert app.post("/sign-in", data={"token": TOKEN}, headers=HERE).status_code == 429


def test_who_signed_out_can_do_nothing_more(app, done):
    csrf = signed_in(app)
    assert app.post("/sign-out", data={"csrf": csrf}, headers=HERE).status_code == 303
    assert app.post("/rollback", data={"csrf": csrf, "version": "notes@1"}, headers=HERE).status_code == 403


def test_the_cookie_is_for_this_site_alone_and_holds_no_token(app):
    cookie = app.post("/sign-in", data={"token": TOKEN}, headers=HERE).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie


def test_a_rollback_that_is_refused_says_why(home):
    def refuse(version: str) -> str:
        raise GuaranteeError("a version of the registry", version, "Name another.")

    page = Client(coordinator_app(home, token=TOKEN, rollback=refuse))
    answer = page.post("/rollback", data={"version": "x@9"}, headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 409 and "Name another." in answer.text


def test_a_short_token_is_refused(home):
    with pytest.raises(RunError, match="at least 16"):
        coordinator_app(home, token="short", rollback=lambda version: "")


def test_the_numbers_are_those_of_the_page_and_name_every_alarm(app, tmp_path):
    text = app.get("/metrics").text
    assert 'foedus_round{run="notes"} 4.0' in text and 'foedus_bytes_total{direction="up",run="notes"} 12000.0' in text
    assert 'foedus_epsilon{run="notes",what="projected"}' in text
    assert all(f'alarm="{name}"' in text for name in ALARMS)
    own = Client(silo_app(silo(tmp_path / "silo"))).get("/metrics").text
    assert "foedus_rounds_given_total 4.0" in own and 'foedus_refusals_total{reason="replayed"} 4.0' in own


def test_it_is_served_until_it_is_stopped(home):
    from urllib.request import urlopen

    with serve(coordinator_app(home), "127.0.0.1:0") as served:
        assert urlopen(f"{served.url}/healthz").read() == b"ok\n"
        with pytest.raises(RunError, match="free"):
            serve(coordinator_app(home), served.url.removeprefix("http://"))
    assert not served.alive
