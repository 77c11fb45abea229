"""A bundle for devices: a model with all that builds, checks and starts it there, in one signed file."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

import edge_dsc
from calibration.table import CalibrationTable, check_table, load_table, save_table
from edge_dsc.build.engine import device_arguments
from edge_dsc.deploy.triton import replaced_folder, travelling_record
from edge_dsc.infer.source import hide_password, parse_source
from engines.contract import LARGEST_MODEL, Count, PathName, Sha256, Text
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import BUNDLE as BUNDLE_FILE
from engines.files import DocumentKind, read_regular, require_writable, sha256_bytes, write_bytes
from engines.graph import OnnxModel, load_model
from engines.record import RECORD, BatchRange, EngineRecord, Precision, load_record

SIGNATURE = ".sig"  # ward.tar -> ward.tar.sig
NAMESPACE = "edge-dsc-bundle"  # of the signatures: one made for something else is none of a bundle
MANIFEST = "bundle.json"
_SIGNER = "edge-dsc"
_LARGEST = LARGEST_MODEL + (64 << 20)  # bytes of a bundle: its model and what is around it
_MOST_FILES = 32
_EXECUTABLE = "install.sh"
_TEMPLATES = ("install.sh", "edge-dsc.service", "Dockerfile", "compose.yaml")
_PUBLIC_KEY = re.compile(r"(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*(?: .*)?")
_PACK_AGAIN = "get it again from whoever packed it"
_KEYGEN = "install OpenSSH 8.1 or later, which has ssh-keygen -Y"


class PackedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a bundle."""

    sha256: Sha256
    bytes: Count


class Bundle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies in a bundle; a document of its own in it.

    Attributes:
        name: Its name, and that of its folder.
        edge_dsc: Version of edge-dsc that packed it.
        onnx_sha256: Hash of the model.
        precision: What the device builds.
        build: Arguments of ``build-engine`` on the device, behind the model.
        files: Every other file by its name.
    """

    name: PathName
    edge_dsc: Text
    onnx_sha256: Sha256
    precision: Precision
    build: Annotated[tuple[str, ...], Meta(max_length=64)]
    files: Mapping[PathName, PackedFile]


BUNDLE = DocumentKind(
    name="edge-dsc/bundle",
    version=1,
    body=Bundle,
    renew="edge-dsc deploy bundle ENGINE --out BUNDLE.tar",
    seal="bundle_sha256",
)


@dataclass(frozen=True, kw_only=True)
class BundleRequest:
    """What to pack.

    Attributes:
        model: An engine, whose record says how the device builds; or a model, or its run's folder.
        out: The bundle, a ``.tar``.
        precision: Of a model: what the device builds.
        key: A private key of OpenSSH to sign with, or a public one whose other half an agent holds; None does not sign.
        source: What the service classifies, unless the device names another.
        port: Of the live page.
    """

    model: Path
    out: Path
    precision: Precision | None = None
    key: Path | None = None
    source: str = "csi://0"
    port: int = 8080


def write_bundle(request: BundleRequest) -> Bundle:
    """Pack a bundle and sign it; the same inputs give the same bytes.

    Raises:
        ArtefactError: The engine, its model or its table is refused.
        EnvironmentProblem: ``ssh-keygen`` is missing or cannot sign with that key; or the place cannot be written.
        UsageError: A precision that no device can build by itself, a password in the source, or a file of another kind.
    """
    if request.out.suffix != ".tar":
        raise UsageError(f"--out {request.out} is no bundle", remedy="name it .tar")
    spec = parse_source(request.source)
    if hide_password(request.source) != request.source:
        raise UsageError(
            f"the source {spec.name} holds a password",
            remedy="name it on the device: SOURCE=... sh install.sh",
        )
    require_writable(request.out, BUNDLE_FILE)
    found = _gather(request)
    data = _pack(found.name, _with_manifest(found))
    signature = None if request.key is None else _sign(data, request.key)
    write_bytes(request.out, data, BUNDLE_FILE)
    place = signature_path(request.out)
    if signature is not None:
        write_bytes(place, signature)
    else:
        place.unlink(missing_ok=True)  # of an earlier bundle, which this one is not
    return found.bundle


def signature_path(bundle: Path) -> Path:
    """Return where the signature of a bundle lies."""
    return bundle.with_name(bundle.name + SIGNATURE)


@dataclass(frozen=True)
class _Content:
    bundle: Bundle
    files: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return self.bundle.name


@dataclass(frozen=True)
class _Origin:
    """What is packed: the model, and the record of the engine that it was proven with."""

    model: OnnxModel
    record: EngineRecord | None
    precision: Precision
    table: CalibrationTable | None


def _gather(request: BundleRequest) -> _Content:
    origin = _origin(request)
    contract = origin.model.contract
    name = f"{contract.architecture}-{origin.precision.value}"
    build = _build_arguments(origin)
    packed = {
        "model.onnx": read_regular(origin.model.path, LARGEST_MODEL),
        "labels.txt": "".join(f"{label}\n" for label in contract.labels).encode(),
    }
    if sha256_bytes(packed["model.onnx"]) != origin.model.sha256:
        raise ArtefactError(
            f"{origin.model.path} changed meanwhile", remedy="try again when nobody writes it"
        )
    if origin.record is not None:
        packed["record.json"] = RECORD.dumps(travelling_record(origin.record)).encode()
    if origin.table is not None:
        packed["calibration.json"] = _nameless(origin.table)
    values = {
        "NAME": name, "EDGE_DSC": edge_dsc.__version__, "BUILD": shlex.join(build),
        "SOURCE": request.source, "PORT": str(request.port),
    }  # fmt: skip
    for template in _TEMPLATES:
        text = (files("edge_dsc.deploy") / "device" / template).read_text(encoding="utf-8")
        packed[template] = _fill(text, values).encode()
    listed = {path: PackedFile(sha256_bytes(data), len(data)) for path, data in sorted(packed.items())}
    bundle = Bundle(
        name=name, edge_dsc=edge_dsc.__version__, onnx_sha256=origin.model.sha256,
        precision=origin.precision, build=tuple(build), files=listed,
    )  # fmt: skip
    return _Content(bundle, packed)


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Put values in the places of a template; the source stands in quotes there."""
    for name, value in values.items():
        text = text.replace(f"@{name}@", shlex.quote(value) if name == "SOURCE" else value)
    return text


def _origin(request: BundleRequest) -> _Origin:
    model = request.model / "model.onnx" if request.model.is_dir() else request.model
    if model.suffix == ".onnx":
        precision = request.precision or Precision.FP32
        record, table_path = None, model.parent / "calibration.json"
    else:
        record = load_record(model)
        if request.precision not in (None, record.precision):
            raise UsageError(
                f"{model} is of {record.precision.value}", remedy="leave --precision out, or bundle its model"
            )
        precision, table_path = record.precision, model.parent / (record.calibration or "calibration.json")
        model = model.parent / record.onnx
    if precision is Precision.MIXED:
        raise UsageError(
            "a device finds the layers of a mixed engine by a search over labelled pictures",
            remedy="bundle the model with --precision int8 or fp16, or run build-engine --precision mixed there",
        )
    loaded = load_model(model)
    if record is not None and loaded.sha256 != record.onnx_sha256:
        raise ArtefactError(
            f"{model} changed after {request.model} was built", remedy=f"rebuild: {record.build_command}"
        )
    table = load_table(table_path) if precision is Precision.INT8 else None
    if table is not None:
        check_table(table, loaded, path=table_path)
    return _Origin(loaded, record, precision, table)


def _build_arguments(origin: _Origin) -> list[str]:
    """Return what the device's build-engine is told: as the engine was built, by whatever runtime works there."""
    record = origin.record
    if record is None:
        words = ["--precision", origin.precision.value, "--batch", str(BatchRange(1, 1, 8))]
    else:
        words = device_arguments(record)
    return [*words, *(["--calibration", "calibration.json"] if origin.table is not None else [])]


def _nameless(table: CalibrationTable) -> bytes:
    """Return a calibration table with hashes for the names of its pictures: they stay where they are."""
    images = tuple(msgspec.structs.replace(image, name=image.sha256[:16]) for image in table.images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.json")
        save_table(path, msgspec.structs.replace(table, images=images, skipped=()))
        return path.read_bytes()


def _with_manifest(content: _Content) -> dict[str, bytes]:
    return {**content.files, MANIFEST: BUNDLE.dumps(content.bundle).encode()}


def _pack(name: str, packed: Mapping[str, bytes]) -> bytes:
    """Return the one archive that stands for these files: the list first, sorted, without times and owners."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(packed, key=lambda path: (path != MANIFEST, path)):
            data = packed[path]
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size, member.mode = len(data), 0o755 if path == _EXECUTABLE else 0o644
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def verify_bundle(path: Path, key: Path | None, out: Path | None = None) -> Bundle:
    """Check a bundle's signature, then its content, and unpack it where asked to.

    Nothing is unpacked before all is checked. An archive that is not, byte for byte, what packing its files gives is
    refused: it holds no links, devices, other owners or paths, nothing twice and nothing behind its end.

    Args:
        path: The bundle; its signature lies beside it.
        key: A file of public keys, one of which must have signed it; None looks at the content alone.
        out: A folder to unpack to: new, empty, or an earlier bundle's.

    Raises:
        ArtefactError: It was changed, is damaged, was signed by another key or by none, or is no bundle.
        EnvironmentProblem: ``ssh-keygen`` is missing, or the folder cannot be written.
        UsageError: The key is no public key, or the folder holds something else.
    """
    try:
        data = read_regular(path, _LARGEST)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", remedy=_PACK_AGAIN) from error
    if key is not None:
        _check_signature(path, data, key)
    bundle, packed = _unpack(path, data)
    if out is not None:
        with replaced_folder(out, _our_names) as folder:
            for name, content in packed.items():
                (folder / name).write_bytes(content)
            (folder / _EXECUTABLE).chmod(0o755)
    return bundle


def _unpack(path: Path, data: bytes) -> tuple[Bundle, dict[str, bytes]]:
    """Return what lies in a bundle, all of it checked."""
    packed: dict[str, bytes] = {}
    folders = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            while (member := archive.next()) is not None:
                folder, _, name = member.name.rpartition("/")
                if member.type != tarfile.REGTYPE or len(packed) >= _MOST_FILES or name in packed:
                    raise _damaged(path, f"{member.name!r} is no plain file, there twice, or one too many")
                content = archive.extractfile(member)
                packed[name] = content.read() if content is not None else b""
                folders.add(folder)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError, MemoryError) as error:
        raise _damaged(path, f"no archive: {error}") from error
    manifest = packed.get(MANIFEST)
    if manifest is None:
        raise _damaged(path, f"no {MANIFEST} inside")
    bundle = BUNDLE.loads(manifest.decode(errors="replace"), f"{MANIFEST} of {path}")
    seen = {
        name: PackedFile(sha256_bytes(held), len(held)) for name, held in packed.items() if name != MANIFEST
    }
    for name in sorted({*seen, *bundle.files}):
        if seen.get(name) != bundle.files.get(name):
            raise _damaged(path, f"{name} is not what its list says")
    if folders != {bundle.name} or _pack(bundle.name, packed) != data:
        raise _damaged(path, "it holds more than its files")
    return bundle, packed


def _damaged(path: Path, why: str) -> ArtefactError:
    return ArtefactError(f"{path} was changed or is no bundle: {why}", remedy=_PACK_AGAIN)


def _our_names(folder: Path) -> set[str]:
    bundle = BUNDLE.load(folder / MANIFEST)
    return {MANIFEST, *bundle.files}


def _sign(data: bytes, key: Path) -> bytes:
    """Sign with ssh-keygen, which asks on the terminal for the passphrase of a key that has one.

    Source: OpenSSH, PROTOCOL.sshsig; ssh-keygen(1), -Y sign.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {key}", remedy="make one: ssh-keygen -t ed25519 -f ward_key")
    done = _keygen(["sign", "-f", str(key), "-n", NAMESPACE], data)
    if done.returncode != 0 or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise EnvironmentProblem(
            f"ssh-keygen cannot sign with {key}: {_last(done.stderr)}",
            remedy="check the key and its passphrase",
        )
    return done.stdout


def _check_signature(path: Path, data: bytes, key: Path) -> None:
    place = signature_path(path)
    if not place.is_file():
        raise ArtefactError(f"{path} is not signed: there is no {place.name} beside it", remedy=_PACK_AGAIN)
    allowed = "".join(f'{_SIGNER} namespaces="{NAMESPACE}" {line}\n' for line in _public_keys(key))
    with tempfile.TemporaryDirectory() as folder:
        signers = Path(folder, "allowed_signers")
        signers.write_text(allowed)
        words = ["verify", "-f", str(signers), "-I", _SIGNER, "-n", NAMESPACE, "-s", str(place)]
        done = _keygen(words, data)
    if done.returncode != 0:
        raise ArtefactError(
            f"{path} was changed, or was not signed by {key}: {_last(done.stderr or done.stdout)}",
            remedy=_PACK_AGAIN,
        )


def _public_keys(key: Path) -> list[str]:
    """Return the type and key of each line of a file of public keys."""
    try:
        text = read_regular(key, 1 << 20).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the key {key}", remedy="name the file that ends in .pub") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines or not all(_PUBLIC_KEY.fullmatch(line) for line in lines):
        raise UsageError(f"{key} holds no public keys of OpenSSH", remedy="name the file that ends in .pub")
    return [" ".join(line.split()[:2]) for line in lines]


def _keygen(words: Sequence[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", *words], input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem("there is no ssh-keygen here", remedy=_KEYGEN) from error


def _last(words: bytes) -> str:
    lines = words.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
