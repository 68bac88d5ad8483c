"""train_dipo.py --push-to-hub against the hub of hub.py, by the real huggingface_hub, without Xet (it needs a storage)."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import test_train_dipo
from helpers import start
from hub import Hub
from huggingface_hub import constants

from dipo import results
from dipo.cli import UserError

pairs_file, train = test_train_dipo.pairs_file, test_train_dipo.train
TOKEN = "hf_" + "secret" * 5
WRITER = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub that knows TOKEN, which is logged in, and this process's client pointed at it."""
    with Hub({}) as hub:
        hub.users[TOKEN] = WRITER
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def no_waiting(monkeypatch):
    """The client tries again at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))


def make_result(folder: Path, lora=False) -> SimpleNamespace:
    """A folder as a run of 6 steps leaves it, with what is not to be uploaded; its settings."""
    kept = {
        "README.md": "---\nlibrary_name: diffusers\n---\n",
        "settings.yaml": "a: 1\n",
        "metrics.csv": "step\n",
        "loss.png": "p",
    }
    kept |= {"unet/config.json": "{}", "unet/diffusion_pytorch_model.safetensors": "weights " * 9000}
    kept |= {"pytorch_lora_weights.safetensors": "lora"}
    others = [
        "checkpoints/step-0000006/README.md",
        "cache/data.parquet",
        "tensorboard/events",
        "validation/base-0.png",
        ".lock",
    ]
    others += ["validation/step-0000003.png", "cache/unet/config.json"]
    for name, text in (kept | dict.fromkeys(others, "x") | {"validation/step-0000006.png": "grid"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return SimpleNamespace(push_to_hub="me/dipo", lora_rank=4 if lora else 0)


WHOLE = {"README.md", "settings.yaml", "metrics.csv", "loss.png", "validation/step-0000006.png"}
UNET = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def as_on_disk(hub, folder, name="me/dipo"):
    """Whether the hub holds what the folder does, for each file that it holds."""
    return all((folder / path).read_bytes() == data for path, data in hub.repos["models"][name].items())


@pytest.mark.parametrize("lora", [False, True])
def test_the_result_and_nothing_else_is_uploaded(hub, tmp_path, capsys, lora):
    s = make_result(tmp_path, lora)
    results.upload_result(s, tmp_path, 6)
    expected = WHOLE | ({"pytorch_lora_weights.safetensors"} if lora else UNET)
    assert set(hub.repos["models"]["me/dipo"]) == expected and as_on_disk(hub, tmp_path)
    assert hub.private == {"me/dipo"} and f"{tmp_path}: uploaded to {hub.url}/me/dipo" in capsys.readouterr().out


def test_again_only_what_changed_is_sent_and_visibility_stays(hub, tmp_path):
    s = make_result(tmp_path)
    hub.repos["models"]["me/dipo"] = {"LICENSE": b"mine"}
    results.upload_result(s, tmp_path, 6)
    hub.requests.clear()
    (tmp_path / "metrics.csv").write_text("step\n7\n")
    results.upload_result(s, tmp_path, 6)
    assert not [path for _, path, _ in hub.requests if path.startswith("/upload/")] and not hub.private
    assert hub.repos["models"]["me/dipo"].pop("LICENSE") == b"mine" and as_on_disk(hub, tmp_path)


def test_a_connection_that_breaks_is_tried_again(hub, tmp_path, no_waiting):
    hub.breaks = 2
    results.upload_result(make_result(tmp_path), tmp_path, 6)
    assert set(hub.repos["models"]["me/dipo"]) == WHOLE | UNET and as_on_disk(hub, tmp_path) and hub.breaks == 0


@pytest.mark.parametrize("fault", ["refused", "broken", "gone"])
def test_a_failed_upload_says_how_to_do_it_later(hub, tmp_path, no_waiting, monkeypatch, fault):
    """One line, nothing of the token in it; the command that it gives uploads the same."""
    folder = tmp_path / "my result"
    s = make_result(folder)
    if fault == "refused":
        hub.users.clear()
    elif fault == "broken":
        hub.breaks = 1000
    else:
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(UserError) as e:
        results.upload_result(s, folder, 6)
    said = str(e.value)
    assert "\n" not in said and said.startswith("--push-to-hub me/dipo: not uploaded (") and TOKEN not in said
    assert {"refused": "401", "broken": "diffusion_pytorch_model.safetensors", "gone": "refused"}[fault] in said
    assert f"the result is kept in {folder}" in said and "README.md" not in hub.repos["models"].get("me/dipo", {})
    hub.users[TOKEN], hub.breaks = WRITER, 0
    command = shlex.split(said.rpartition("upload it with ")[2])
    assert command[:2] == ["hf", "upload"]
    known = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    done = start(Path(sys.executable).with_name("hf"), *command[1:], cwd=tmp_path, HF_HOME=str(tmp_path / "home"), **known)
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["models"]["me/dipo"]) == WHOLE | UNET and as_on_disk(hub, folder) and hub.private == {"me/dipo"}


ONLY_READS = WRITER | {"auth": {"accessToken": {"role": "read"}}}
FINE_GRAINED = WRITER | {"auth": {"accessToken": {"role": "fineGrained"}}}


@pytest.mark.parametrize(
    ("name", "user", "said"),
    [
        ("dipo", WRITER, "give owner/name"),
        ("me/dipo/unet", WRITER, "give owner/name"),
        ("me/my model", WRITER, "give owner/name"),
        ("me/dipo", None, "takes no token from here (Invalid user token"),
        ("me/dipo", ONLY_READS, "the token may only read"),
        ("you/dipo", WRITER, "the token may not write there; give me/dipo or lab/dipo"),
    ],
)
def test_what_cannot_be_uploaded_later_is_refused_before_training(hub, train, name, user, said):
    hub.users = {TOKEN: user} if user else {}
    code, _, err = train(
        "--output-dir", "out", "--max-train-steps", 1, "--base-model", "nobody/nothing", "--push-to-hub", name
    )
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"error: --push-to-hub {name}: ") and said in lines[0], err
    assert TOKEN not in err and not [path for method, path, _ in hub.requests if method != "GET"]


@pytest.mark.parametrize(("name", "user"), [("me/dipo", WRITER), ("Lab/dipo", WRITER), ("club/dipo", FINE_GRAINED)])
def test_what_may_be_uploaded_is_not(hub, name, user):
    hub.users[TOKEN] = user
    results.check_upload(name)


def test_without_token_or_network(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token found.*`hf auth login`"):
        results.check_upload("me/dipo")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"takes no token from here \(.*\); look at .* the connection"):
        results.check_upload("me/dipo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset the `HF_HUB_OFFLINE`"):
        results.check_upload("me/dipo")
    assert not hub.requests


def test_a_run_uploads_and_a_finished_one_does_so_again(hub, train, tmp_path, no_waiting):
    """The weights are kept where the upload fails; --resume makes up for it, to another repository too."""
    flags = ("--output-dir", "out", "--max-train-steps", 2, "--validate-every", 2)
    out, repos = tmp_path / "out", hub.repos["models"]
    hub.refuse["me/dipo"] = (403, "")
    code, said, err = train(*flags, "--push-to-hub", "me/dipo")
    assert code == 2 and "error: --push-to-hub me/dipo: not uploaded (" in err and "Traceback" not in err, err
    assert "sample it with hasty_sample.py --dpo-unet out" in said and (out / "unet/config.json").exists()
    before = test_train_dipo.weights(out)
    hub.refuse.clear()
    for name in ("me/dipo", "me/other"):
        code, said, err = train(*flags, "--push-to-hub", name, "--resume")
        assert code == 0 and f"uploaded to {hub.url}/{name}" in said, err
        assert set(repos[name]) == {x.replace("6", "2") for x in WHOLE} | UNET and as_on_disk(hub, out, name)
        card = repos[name]["README.md"].decode()
        assert f"--dpo-unet {name}\n" in card and f'from_pretrained("{name}", subfolder="unet")' in card
        assert not any(TOKEN.encode() in data for data in repos[name].values())
    assert test_train_dipo.same(before, test_train_dipo.weights(out))
    (tmp_path / "again/unet").mkdir(parents=True)
    for path in UNET:
        (tmp_path / "again" / path).write_bytes(repos["me/other"][path])
    assert test_train_dipo.same(before, test_train_dipo.weights(tmp_path / "again"))


@pytest.mark.parametrize(("base", "said"), [("owner/name/a/b.safetensors", "owner/name"), ("owner/name", "owner/name")])
def test_the_card_names_the_repository_of_a_file(base, said):
    card = results.model_card(test_train_dipo.td.Settings(base_model=base), {"steps": 1})
    assert f"\nbase_model: {said}\n" in card
