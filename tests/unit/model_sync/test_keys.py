"""Keys: encrypted files and PKCS#11 tokens, and what is said when one does not open."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner

from model_sync.errors import SettingsError
from model_sync.library.keys import generate, load_holder, load_signer, public_path, write_public

SECRET = "correct horse battery staple"


def ask(_what: str) -> str:
    return SECRET


def wrong(_what: str) -> str:
    return "incorrect horse"


def test_a_key_is_encrypted_private_and_signs(tmp_path: Path) -> None:
    key = generate(tmp_path / "alice.pem", SECRET)
    assert stat.S_IMODE((tmp_path / "alice.pem").stat().st_mode) == 0o600
    assert b"ENCRYPTED" in (tmp_path / "alice.pem").read_bytes()
    assert load_holder(tmp_path / "alice.pem").name == "alice"
    assert load_holder(public_path(tmp_path / "alice.pem")).key == key
    signer = load_signer(tmp_path / "alice.pem", ask, key)
    key.verify_signature(signer.sign(b"data"), b"data")


def test_the_passphrase_is_asked_for_by_the_name_of_the_file(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    asked: list[str] = []

    def note(what: str) -> str:
        asked.append(what)
        return SECRET

    load_signer(tmp_path / "alice.pem", note)
    assert asked == ["passphrase of alice.pem"]


def refused(path: Path | str, says: str, passphrase: object = ask, **options: object) -> SettingsError:
    with pytest.raises(SettingsError, match=says) as caught:
        load_signer(path, passphrase, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_a_wrong_passphrase_is_said_so(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    refused(tmp_path / "alice.pem", "wrong passphrase", wrong)


def test_an_empty_passphrase_is_a_wrong_one(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    refused(tmp_path / "alice.pem", "wrong passphrase", lambda _what: "")


def test_an_unencrypted_key_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "bare.pem").write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    assert "openssl pkcs8" in refused(tmp_path / "bare.pem", "not an encrypted").hint


def test_a_missing_key_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pem", "No such file")


def test_a_directory_is_no_key(tmp_path: Path) -> None:
    refused(tmp_path, "directory")


@pytest.mark.parametrize("cut", [60, 120])
def test_a_damaged_key_file(tmp_path: Path, cut: int) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    (tmp_path / "alice.pem").write_bytes((tmp_path / "alice.pem").read_bytes()[:cut])
    refused(tmp_path / "alice.pem", "damaged")


def test_another_key_than_the_one_that_was_given_to_the_library(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    bob = generate(tmp_path / "bob.pem", SECRET)
    refused(tmp_path / "alice.pem", "another key", public_key=bob)


def test_a_short_passphrase_makes_no_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least"):
        generate(tmp_path / "alice.pem", "short")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("present", ["alice.pem", "alice.pem.pub.json"])
def test_a_key_is_never_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("mine")
    with pytest.raises(SettingsError, match="exists"):
        generate(tmp_path / "alice.pem", SECRET)
    assert [path.name for path in tmp_path.iterdir()] == [present]
    assert (tmp_path / present).read_text() == "mine"


def test_no_directory_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        generate(tmp_path / "absent" / "alice.pem", SECRET)


def test_a_key_that_openssl_encrypted_with_scrypt_opens(tmp_path: Path) -> None:
    signer = CryptoSigner.generate_ed25519()
    (tmp_path / "bare.pem").write_bytes(signer.private_bytes)
    command = ["openssl", "pkcs8", "-topk8", "-scrypt", "-in", "bare.pem", "-out", "strong.pem", "-passout", f"pass:{SECRET}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert load_signer(tmp_path / "strong.pem", ask).public_key.keyid == signer.public_key.keyid


def test_a_key_of_another_kind_in_an_encrypted_file(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    private = load_pem_private_key((tmp_path / "alice.pem").read_bytes(), SECRET.encode())
    bare = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "renamed.pem").write_bytes(bare)
    refused(tmp_path / "renamed.pem", "not an encrypted")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": "a", "keyid": "b"}', '{"name": "a", "keyid": "b", "key": {}}', "\x00"])
def test_what_is_no_public_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.pub.json").write_text(text)
    with pytest.raises(SettingsError, match="no public key"):
        load_holder(tmp_path / "x.pub.json")


def test_a_public_key_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load_holder(tmp_path / "x.pem")


def test_one_key_under_two_ids_would_count_twice(tmp_path: Path) -> None:
    generate(tmp_path / "alice.pem", SECRET)
    file = public_path(tmp_path / "alice.pem")
    document = json.loads(file.read_text())
    document["keyid"] = "0" * 64
    file.write_text(json.dumps(document))
    with pytest.raises(SettingsError, match="key id"):
        load_holder(file)


# --- tokens -------------------------------------------------------------------------------------------------------------


PIN = "1234"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real SoftHSM token with an EC P-256 key; yields its URI."""
    module = next((path for path in Path("/usr/lib").rglob("libsofthsm2.so")), None)
    assert module is not None and shutil.which("softhsm2-util"), "softhsm2 is missing: run `make setup-test`"
    (tmp_path / "tokens").mkdir()
    conf = tmp_path / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    monkeypatch.setenv("PYKCS11LIB", str(module))
    # In a process of its own: SoftHSM reads its configuration once per process.
    script = (
        "import os, pkcs11\n"
        "from pkcs11.util.ec import encode_named_curve_parameters\n"
        "lib = pkcs11.lib(os.environ['PYKCS11LIB'])\n"
        "token = lib.get_token(token_label='library')\n"
        f"with token.open(user_pin='{PIN}', rw=True) as session:\n"
        "    parameters = session.create_domain_parameters(pkcs11.KeyType.EC,\n"
        "        {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters('secp256r1')}, local=True)\n"
        "    parameters.generate_keypair(store=True, label='signing', id=bytes([2]))\n"
    )
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "library", "--pin", PIN, "--so-pin", PIN], check=True, capture_output=True
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    yield "hsm:2?label=library"


def in_a_process(script: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines that use the token."""
    head = "from model_sync.library.keys import *\nfrom model_sync.errors import SettingsError\nfrom pathlib import Path\n"
    return subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, check=False)


def test_a_token_signs_and_its_pin_is_asked_once(token: str) -> None:
    done = in_a_process(
        f"asked = []\n"
        f"signer = load_signer({token!r}, lambda what: asked.append(what) or {PIN!r})\n"
        "for data in (b'one', b'two'):\n"
        "    signer.public_key.verify_signature(signer.sign(data), data)\n"
        "print(signer.public_key.scheme, asked)\n"
    )
    assert done.stdout == "ecdsa-sha2-nistp256 ['PIN of the token library']\n", done.stderr


def test_a_library_is_signed_by_a_token(token: str, tmp_path: Path) -> None:
    done = in_a_process(
        "from model_sync.library.library import Library\n"
        "from securesystemslib.signer import CryptoSigner\n"
        f"token = load_signer({token!r}, lambda what: {PIN!r})\n"
        "file, online = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()\n"
        "keys = [file.public_key, token.public_key]\n"
        f"library = Library.init(Path({str(tmp_path / 'lib')!r}), keys, keys, snapshot_key=online.public_key,\n"
        "    timestamp_key=online.public_key, signers=[file, online])\n"
        "library.sign('root', token)\n"
        "print(library.sign('targets', token).published, library.verify().problems)\n"
    )
    assert done.stdout == "True []\n", done.stderr


def test_the_public_part_of_a_token_is_written_for_the_ceremony(token: str, tmp_path: Path) -> None:
    (tmp_path / "pin").write_text(PIN)
    (tmp_path / "pin").chmod(0o600)
    command = ["key", "token", token, tmp_path / "alice.pub.json", "--name", "alice", "--passphrase-file", tmp_path / "pin"]
    done = subprocess.run([sys.executable, "-m", "model_sync.fleet.cli", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    holder = load_holder(tmp_path / "alice.pub.json")
    assert holder.name == "alice"
    assert f"key id {holder.key.keyid[:8]}" in done.stdout


BAD_TOKENS = {
    "wrong pin": ("hsm:2?label=library", "refuses the PIN", "9999"),
    "no such token": ("hsm:2?label=other", "No PKCS#11 token found", PIN),
    "no such key": ("hsm:7?label=library", "could not find", PIN),
    "no number": ("hsm:two?label=library", "names no token key", PIN),
    "no label": ("hsm:2?pin=1234", "names no token key", PIN),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_token_that_does_not_work_is_said_so(token: str, name: str) -> None:
    uri, says, pin = BAD_TOKENS[name]
    done = in_a_process(
        "from model_sync.library.library import add_signature\n"
        "from tuf.api.metadata import Metadata, Targets\n"
        "try:\n"
        f"    add_signature(Metadata(Targets()), load_signer({uri!r}, lambda what: {pin!r}))\n"
        "except SettingsError as error:\n"
        "    print(error)\n"
    )
    assert says in done.stdout, done.stdout + done.stderr
    assert "hint: " in done.stdout


def test_a_token_with_another_key(token: str, tmp_path: Path) -> None:
    write_public(tmp_path / "other.pub.json", CryptoSigner.generate_ecdsa().public_key, "other")
    done = in_a_process(
        f"key = load_holder(Path({str(tmp_path / 'other.pub.json')!r})).key\n"
        "try:\n"
        f"    load_signer({token!r}, lambda what: {PIN!r}, key)\n"
        "except SettingsError as error:\n"
        "    print(error)\n"
    )
    assert "holds another key" in done.stdout, done.stderr


def test_no_module_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKCS11LIB", raising=False)
    assert "PYKCS11LIB" in refused("hsm:2?label=library", "PYKCS11LIB").hint
