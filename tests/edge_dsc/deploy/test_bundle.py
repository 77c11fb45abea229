"""Bundles: the same bytes each time, whose they are, and nothing taken out of one that is not sound."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_dsc.deploy.bundle import BundleRequest, verify_bundle, write_bundle
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.record import Precision

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen here")
FILES = {
    "Dockerfile", "bundle.json", "calibration.json", "compose.yaml", "edge-dsc.service", "install.sh", "labels.txt",
    "model.onnx", "record.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def int8_engine(built_run: Path) -> Path:
    return built_run / "dsc-int8.onnxruntime.engine"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pairs ``ours`` and ``theirs``."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def packed(int8_engine: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle. Read only; copy it before you change it."""
    out = tmp_path_factory.mktemp("packed") / "ward.tar"
    write_bundle(BundleRequest(model=int8_engine, out=out, key=keys / "ours"))
    return out


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy of the bundle and its signature."""
    shutil.copy(f"{packed}.sig", tmp_path)
    return Path(shutil.copy(packed, tmp_path))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_it_holds_what_a_device_needs(packed: Path, int8_engine: Path, keys: Path, tmp_path: Path) -> None:
    made = verify_bundle(packed, keys / "ours.pub", tmp_path / "out")
    assert made.name == "dsc-int8" and {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert (
        " ".join(made.build)
        == "--precision int8 --batch 1:1:4 --workspace 1024 --calibration calibration.json"
    )
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (int8_engine.parent / "model.onnx").read_bytes()
    assert (tmp_path / "out" / "labels.txt").read_text() == "clear\nfocal\ndiffuse\n"
    assert os.access(tmp_path / "out" / "install.sh", os.X_OK)
    for name in FILES - {"model.onnx"}:  # every place of a template is filled
        assert not re.search("@[A-Z_]+@", (tmp_path / "out" / name).read_text()), name
    verify_bundle(packed, keys / "ours.pub", tmp_path / "out")  # an earlier bundle of ours is replaced


def test_the_same_inputs_give_the_same_bytes(int8_engine: Path, packed: Path, tmp_path: Path) -> None:
    write_bundle(BundleRequest(model=int8_engine, out=tmp_path / "again.tar"))
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as archive:
        kinds = {(member.mtime, member.uid, member.gid, member.uname, member.type) for member in archive}
    assert kinds == {(0, 0, 0, "", tarfile.REGTYPE)}


def test_names_of_pictures_stay_at_home(packed: Path, int8_engine: Path) -> None:
    assert b"focal/000.png" in (int8_engine.parent / "calibration.json").read_bytes()
    assert not any(b".png" in data for data in members(packed).values())


@pytest.mark.parametrize("place", ["model.onnx", "install.sh", "bundle.json", "header", "end"])
def test_a_byte_that_was_changed_is_found(bundle: Path, keys: Path, tmp_path: Path, place: str) -> None:
    data = bytearray(bundle.read_bytes())
    with tarfile.open(bundle) as archive:
        offsets = {
            member.name.rpartition("/")[2]: member.offset_data + member.size // 2 for member in archive
        }
    at = {"header": 110, "end": len(data) - 1}.get(place, offsets.get(place, 0))
    data[at] ^= 1
    bundle.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"was changed, or was not signed by .*ours\.pub"):
        verify_bundle(bundle, keys / "ours.pub", tmp_path / "out")
    with pytest.raises(ArtefactError):
        verify_bundle(bundle, None, tmp_path / "out")  # without a signature the content alone tells
    assert not (tmp_path / "out").exists()


def test_another_key_or_none_is_refused(bundle: Path, keys: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"was not signed by .*theirs\.pub"):
        verify_bundle(bundle, keys / "theirs.pub")
    both = tmp_path / "both.pub"
    both.write_text("# the ward's\n" + (keys / "theirs.pub").read_text() + (keys / "ours.pub").read_text())
    verify_bundle(bundle, both)
    bundle.with_name("ward.tar.sig").unlink()
    with pytest.raises(ArtefactError, match=r"is not signed: there is no ward\.tar\.sig beside it"):
        verify_bundle(bundle, keys / "ours.pub")


def test_a_signature_for_something_else_is_none(bundle: Path, keys: Path) -> None:
    signature = bundle.with_name("ward.tar.sig")
    with bundle.open("rb") as stream, signature.open("wb") as out:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(keys / "ours"), "-n", "git"]
        subprocess.run(command, stdin=stream, stdout=out, check=True, stderr=subprocess.DEVNULL)
    with pytest.raises(ArtefactError, match="was not signed by"):
        verify_bundle(bundle, keys / "ours.pub")


def test_a_private_key_is_no_key_to_check_with(bundle: Path, keys: Path) -> None:
    with pytest.raises(UsageError, match="holds no public keys"):
        verify_bundle(bundle, keys / "ours")
    with pytest.raises(UsageError, match="cannot read the key"):
        verify_bundle(bundle, keys / "nobody.pub")


def made(entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member, data in entries:
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def entry(name: str, data: bytes, **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o755 if name.endswith("install.sh") else 0o644
    for field, value in changes.items():
        setattr(member, field, value)
    return member, data


Entries = list[tuple[tarfile.TarInfo, bytes]]


def link(kind: bytes) -> Callable[[Entries], Entries]:
    return lambda entries: [*entries, entry("dsc-int8/more", b"", type=kind, linkname="/etc/passwd", size=0)]


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda entries: [*entries, entry("dsc-int8/../../climb", b"x")], id="climbs"),
        pytest.param(lambda entries: [*entries, entry("/etc/cron.d/x", b"x")], id="absolute"),
        pytest.param(lambda entries: [*entries, entry("other/x", b"x")], id="another folder"),
        pytest.param(link(tarfile.SYMTYPE), id="link"),
        pytest.param(link(tarfile.LNKTYPE), id="hard link"),
        pytest.param(link(tarfile.CHRTYPE), id="device"),
        pytest.param(link(tarfile.FIFOTYPE), id="pipe"),
        pytest.param(link(tarfile.DIRTYPE), id="folder"),
        pytest.param(lambda entries: [*entries, entries[-1]], id="twice"),
        pytest.param(lambda entries: entries[:-1], id="one missing"),
        pytest.param(lambda entries: [*entries, entry("dsc-int8/more", b"x")], id="one more"),
        pytest.param(lambda entries: entries[::-1], id="another order"),
        pytest.param(lambda entries: [entry(m.name, d, mode=0o4755) for m, d in entries], id="setuid"),
        pytest.param(lambda entries: [entry(m.name, d, uid=1000) for m, d in entries], id="owner"),
        pytest.param(lambda entries: [entry(m.name, d, mtime=1) for m, d in entries], id="time"),
        pytest.param(lambda entries: [entry(m.name, d, pax_headers={"a": "b"}) for m, d in entries], id="pax"),
    ],
)  # fmt: skip
def test_an_archive_that_packing_would_not_give_is_refused(
    bundle: Path, tmp_path: Path, harm: Callable[[Entries], Entries]
) -> None:
    """Signed or not: here nobody looks at the signature."""
    entries = [entry(name, data) for name, data in members(bundle).items()]
    bundle.write_bytes(made(harm(entries)))
    with pytest.raises(ArtefactError, match="was changed or is no bundle"):
        verify_bundle(bundle, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ward.tar", "ward.tar.sig"]


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b"\0" * 10240])
def test_what_is_no_archive_is_refused(bundle: Path, data: bytes) -> None:
    bundle.write_bytes(data)
    with pytest.raises(ArtefactError, match="was changed or is no bundle"):
        verify_bundle(bundle, None)
    bundle.unlink()
    with pytest.raises(ArtefactError, match="cannot read"):
        verify_bundle(bundle, None)


def test_a_truncated_or_longer_bundle_is_refused(bundle: Path) -> None:
    data = bundle.read_bytes()
    for changed in (data[:-1], data[:5000], data + b"\0", data + b"x" * 512):
        bundle.write_bytes(changed)
        with pytest.raises(ArtefactError, match="was changed or is no bundle"):
            verify_bundle(bundle, None)


def test_a_folder_of_somebody_else_is_not_unpacked_to(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("theirs")
    with pytest.raises(UsageError, match="is not empty and was not made by edge-dsc"):
        verify_bundle(bundle, None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_model_says_how_it_is_built_by_its_precision(
    deployed_models: dict[str, Path], int8_engine: Path, tmp_path: Path
) -> None:
    found = write_bundle(
        BundleRequest(model=deployed_models["cnn"], out=tmp_path / "a.tar", precision=Precision.FP16)
    )
    assert (found.name, " ".join(found.build)) == ("cnn-fp16", "--precision fp16 --batch 1:1:8")
    assert set(found.files) == FILES - {"bundle.json", "calibration.json", "record.json"}
    found = write_bundle(
        BundleRequest(model=int8_engine.parent, out=tmp_path / "a.tar", precision=Precision.INT8)
    )
    assert "calibration.json" in found.files and "record.json" not in found.files


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": Path("a.zip")}, "a.zip is no bundle"),
        ({"precision": Precision.FP16}, "is of int8"),
        ({"source": "rtsp://me:secret@host/live"}, r"the source rtsp://me:\*\*\*@host/live holds a password"),
        ({"key": Path("nobody")}, "there is no key nobody"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    int8_engine: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        write_bundle(BundleRequest(**{"model": int8_engine, "out": tmp_path / "a.tar", **changes}))
    assert not (tmp_path / "a.tar").exists()


def test_a_mixed_engine_is_for_its_device(deployed_models: dict[str, Path], tmp_path: Path) -> None:
    request = BundleRequest(model=deployed_models["dsc"], out=tmp_path / "a.tar", precision=Precision.MIXED)
    with pytest.raises(UsageError, match="a device finds the layers of a mixed engine"):
        write_bundle(request)


def test_a_key_that_does_not_sign_leaves_the_old_bundle(
    bundle: Path, int8_engine: Path, tmp_path: Path
) -> None:
    before = bundle.read_bytes()
    (tmp_path / "key").write_text("no key")
    with pytest.raises(EnvironmentProblem, match="ssh-keygen cannot sign with"):
        write_bundle(BundleRequest(model=int8_engine, out=bundle, key=tmp_path / "key", port=9))
    assert bundle.read_bytes() == before


def test_a_bundle_without_a_signature_loses_that_of_the_one_before(bundle: Path, int8_engine: Path) -> None:
    write_bundle(BundleRequest(model=int8_engine, out=bundle, port=9))
    assert not bundle.with_name("ward.tar.sig").exists()


def test_a_file_of_another_kind_is_not_replaced(int8_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "ward.tar").write_text("path,label,\n")
    with pytest.raises(UsageError, match="would be replaced by a bundle"):
        write_bundle(BundleRequest(model=int8_engine, out=tmp_path / "ward.tar"))


def test_the_commands_pack_check_and_unpack(
    edge_dsc: Any, int8_engine: Path, keys: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ward.tar"
    done = edge_dsc("deploy", "bundle", int8_engine, "--out", out, "--sign", keys / "ours")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1] == f"{out}.sig"
    done = edge_dsc("deploy", "verify", out, "--key", keys / "ours.pub", "--out", tmp_path / "ward")
    assert done.out == (
        f"{out}: dsc-int8, 8 files, sound, signed by {keys / 'ours.pub'}\nsudo sh {tmp_path / 'ward' / 'install.sh'}\n"
    )
    assert edge_dsc("deploy", "verify", out, "--unsigned", "--json").json["signed"] is False
    assert edge_dsc("inspect", out).out.startswith("what: bundle, its signature not looked at\n")
    for words in ([], ["--key", keys / "ours.pub", "--unsigned"]):
        done = edge_dsc("deploy", "verify", out, *words)
        assert (done.code, done.err.count("verify takes a key, or --unsigned")) == (2, 1)
    out.write_bytes(out.read_bytes()[:-1] + b"?")
    assert edge_dsc("deploy", "verify", out, "--key", keys / "ours.pub").code == 4


@pytest.mark.slow
def test_the_install_script_builds_the_engine_that_the_record_names(packed: Path, tmp_path: Path) -> None:
    verify_bundle(packed, None, tmp_path / "ward")
    program = tmp_path / "edge-dsc"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edge_dsc "$@"\n')
    program.chmod(0o755)
    place = tmp_path / "place"
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ, "EDGE_DSC": str(program), "PLACE": str(place), "SERVICE": "no", "SELFTEST": "no",
        "PYTHONPATH": root,
    }  # fmt: skip
    command = ["sh", str(tmp_path / "ward" / "install.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(place / "dsc-int8.engine")
    assert '"precision": "int8"' in (place / "dsc-int8.engine.json").read_text()
    environment["EDGE_DSC"] = ""
    environment["PATH"] = "/usr/bin:/bin"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert done.stderr.startswith("error: there is no edge-dsc here: install version")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(packed: Path, tmp_path: Path) -> None:
    verify_bundle(packed, None, tmp_path / "ward")
    text = (tmp_path / "ward" / "edge-dsc.service").read_text()
    unit = tmp_path / "edge-dsc-ward.service"
    unit.write_text(text.replace("/usr/bin/edge-dsc", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert not [line for line in done.stderr.splitlines() if "edge-dsc-ward" in line], done.stderr
