"""Settings: every mistake at once, secrets masked, and `.env.example` in step with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import (
    PROJECT_ROOT,
    ConfigError,
    Limits,
    Settings,
    display_value,
    load_settings,
    main,
    set_torch_environment,
    setting_names,
)


def mistakes(**environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ, env_file=None)
    return caught.value.mistakes


def test_defaults_are_those_of_limits() -> None:
    assert load_settings({}, env_file=None).limits == Limits()


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("AVITO_PORT=1111\nAVITO_HOST='0.0.0.0'\nOTHER=x\nAVITO_LOG_FILE=a$HOME\n")
    settings = load_settings({"AVITO_PORT": "2222"}, env_file=file)
    assert (settings.port, settings.host, settings.log_file) == (2222, "0.0.0.0", "a$HOME")


def test_all_mistakes_come_at_once_with_name_value_and_rule() -> None:
    found = mistakes(
        AVITO_PORT="70000", AVITO_THREADS="many", AVITO_ENV="prod", AVITO_RATE_LIMIT="fast", AVITO_DEVICE="tpu"
    )
    assert len(found) == 5
    by_name = {line.partition("=")[0]: line for line in found}
    assert "70000" in by_name["AVITO_PORT"] and "65535" in by_name["AVITO_PORT"]
    assert "many" in by_name["AVITO_THREADS"] and "integer" in by_name["AVITO_THREADS"]
    assert "prod" in by_name["AVITO_ENV"] and "'development' or 'production'" in by_name["AVITO_ENV"]
    assert "10/minute" in by_name["AVITO_RATE_LIMIT"]
    assert "cuda:N" in by_name["AVITO_DEVICE"]


@pytest.mark.parametrize("name", ["AVITO_PROT", "AVIBE_PATH", "AVISION_X", "AVITO_"])
def test_unknown_names_with_our_prefixes_are_refused(name: str) -> None:
    assert mistakes(**{name: "1"}) == [f"{name}: no such setting"]


def test_other_names_are_left_alone() -> None:
    load_settings({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "AVITOLOG": "x"}, env_file=None)


def test_secrets_are_masked_in_mistakes_output_and_repr() -> None:
    assert "short" not in " ".join(mistakes(AVITO_OPS_TOKEN="short"))
    token = "correct-horse-battery"
    uri = "redis://user:hunter2/x@localhost:6379"
    settings = load_settings({"AVITO_OPS_TOKEN": token, "AVITO_RATE_LIMIT_STORAGE_URI": uri}, env_file=None)
    shown = "\n".join(display_value(settings, name) for name in setting_names().values())
    assert token not in shown and token not in repr(settings) and "hunter2" not in shown
    assert settings.ops_token.get_secret_value() == token
    assert "hunter2" not in " ".join(mistakes(AVITO_RATE_LIMIT_STORAGE_URI="http://user:hunter2@x"))


def test_grace_must_cover_the_longest_request() -> None:
    load_settings({"AVITO_REQUEST_DEADLINE_S": "20", "AVITO_GRACE_S": "30"}, env_file=None)
    (mistake,) = mistakes(AVITO_REQUEST_DEADLINE_S="20", AVITO_GRACE_S="29.9")
    assert "= 30" in mistake and "29.9" in mistake
    assert len(mistakes(AVITO_REQUEST_DEADLINE_S="500", AVITO_PORT="x", AVITO_NOPE="1")) == 3


def test_drain_time_needs_the_token_that_opens_the_drain() -> None:
    assert "AVITO_OPS_TOKEN" in mistakes(AVITO_DRAIN_S="5")[0]
    load_settings({"AVITO_DRAIN_S": "5", "AVITO_OPS_TOKEN": "x" * 16}, env_file=None)


@pytest.mark.parametrize("value", ["*", "example.com", "https://x/path", "javascript:alert(1)", "http://[::1]:3000"])
def test_origins_must_be_origins(value: str) -> None:
    assert "AVITO_CORS_ORIGINS" in mistakes(AVITO_CORS_ORIGINS=value)[0]


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({}, env_file=None)
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def example_values() -> dict[str, str]:
    text = (PROJECT_ROOT / ".env.example").read_text()
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]", line))


def test_env_example_names_every_setting_with_its_default() -> None:
    defaults = load_settings({}, env_file=None)
    expected = {name: display_value(defaults, attribute) for name, attribute in setting_names().items()}
    # The two values that are not the defaults: they make the newcomer's installation answer.
    assert example_values() == expected | {"AVIBE_MODEL_PATH": "vibe/demo", "AVISION_MODEL_PATH": "vision/demo"}


def test_env_example_says_what_each_setting_is_for() -> None:
    text = (PROJECT_ROOT / ".env.example").read_text()
    for name, field in Settings.model_fields.items():
        assert f"# {field.description}\n{field.alias}=" in text, name


def test_command_prints_the_configuration_or_every_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("AVITO_", "AVIBE_", "AVISION_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AVITO_PORT", "9999")
    assert main([]) == 0
    assert "AVITO_PORT=9999" in capsys.readouterr().out
    assert main(["--get", "AVITO_PORT"]) == 0
    assert capsys.readouterr().out == "9999\n"
    monkeypatch.setenv("AVITO_PORT", "x")
    monkeypatch.setenv("AVITO_NOPE", "x")
    assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_server_refuses_a_bad_configuration_before_it_binds_the_port() -> None:
    """One sentence on stderr, no traceback, not zero."""
    environ = {**os.environ, "AVIBE_MODEL_PATH": "/nowhere", "AVISION_MODEL_PATH": "", "AVITO_PORT": "1"}
    assert start_server(environ) == "configuration: AVIBE_MODEL_PATH: /nowhere is not a folder\n"
    environ["AVITO_LOG_FILE"] = "/nowhere/x.log"
    expected = "configuration: AVITO_LOG_FILE=/nowhere/x.log: cannot be written: No such file or directory\n"
    assert start_server(environ) == expected


def start_server(environ: dict[str, str]) -> str:
    """What a server that must refuse to start says on stderr."""
    command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn_config.py"]
    result = subprocess.run(command, cwd=PROJECT_ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    return result.stderr


def test_torch_environment_is_set_and_an_operators_own_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    set_torch_environment(load_settings({"AVITO_COMPILE_CACHE": "elsewhere"}, None))
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    set_torch_environment(load_settings({"AVITO_COMPILE_CACHE": "elsewhere"}, None))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(PROJECT_ROOT / "elsewhere")
