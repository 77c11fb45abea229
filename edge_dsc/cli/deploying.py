"""Commands of ``deploy``: triton, bundle, verify, deepstream."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.console import give, give_json, say
from edge_dsc.cli.options import Engine, Json, finite
from engines.errors import UsageError


class Precision(str, enum.Enum):
    """What a device can build by itself, of engines.record.Precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class TritonBackend(str, enum.Enum):
    """The names of edge_dsc.deploy.triton.BACKENDS."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"
    PYTHON = "python"


def triton(
    engines: Annotated[
        list[Path], typer.Argument(help="Engines that build-engine wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The model repository.")] = Path("runs/triton"),
    backend: Annotated[
        TritonBackend,
        typer.Option(
            "--triton-backend",
            help="What runs the engines; auto: TensorRT for plans, else Python with our runner.",
        ),
    ] = TritonBackend.AUTO,
    instances: Annotated[
        int, typer.Option("--instances", min=1, max=64, help="Copies of each engine at once.")
    ] = 1,
    queue_delay: Annotated[
        int,
        typer.Option(
            "--queue-delay",
            min=0,
            max=1_000_000,
            metavar="MICROSECONDS",
            help="Hold a request back for so long, that others join its batch.",
        ),
    ] = 0,
    unsure: Annotated[
        float,
        typer.Option(
            "--unsure",
            min=0,
            max=1,
            callback=finite,
            help="Count answers whose best class is under this as unsure.",
        ),
    ] = 0.6,
    front: Annotated[
        bool, typer.Option("--front/--no-front", help="Make a model for each that takes whole image files.")
    ] = True,
    json: Json = False,
) -> None:
    """Each engine becomes a model that takes pixels, NAME, and one that takes whole files and DICOM, NAME_files.

    The record travels beside the engine; the models do not start where it does not fit. Start the server with
    tritonserver --model-repository=OUT; then edge-dsc infer SOURCE --server grpc://HOST:8001/NAME.
    """
    from edge_dsc.deploy.triton import TritonRequest, write_repository

    request = TritonRequest(
        engines=engines,
        out=out,
        backend=backend.value,
        instances=instances,
        queue_delay_us=queue_delay,
        unsure=unsure,
        front=front,
    )
    made = write_repository(request)
    if json:
        give_json("edge-dsc/deploy-triton-result", {"repository": str(out), "models": made.models})
        return
    for model in made.models:
        front_name = f", {model.front} takes whole files" if model.front else ""
        give(f"{model.name}: {model.backend} backend{front_name}")
        say(f"note: {model.note}")
    give(f"tritonserver --model-repository={out}")


def bundle(
    model: Annotated[
        Path,
        typer.Argument(
            help="An engine, whose record says how the device builds; or a model, or its run's folder.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The bundle, a .tar.")] = Path("runs/bundle.tar"),
    precision: Annotated[
        Optional[Precision],
        typer.Option(
            "--precision", help="Of a model: what the device builds; default: fp32.", show_default=False
        ),
    ] = None,
    sign: Annotated[
        Optional[Path],
        typer.Option("--sign", metavar="KEY", help="Sign with this key of OpenSSH.", show_default=False),
    ] = None,
    source: Annotated[
        str, typer.Option("--source", help="What the device's service classifies, unless it names another.")
    ] = "csi://0",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of the service's page.")] = 8080,
    json: Json = False,
) -> None:
    """One file with model, calibration, record, labels, a systemd unit, a container's files and install.sh.

    The signature is a file beside it, OUT.sig. On the device: edge-dsc deploy verify OUT --key KEY.pub --out DIR, then
    sudo sh DIR/install.sh, which builds the engine there and runs selftest. The same inputs give the same bytes.
    """
    from edge_dsc.deploy.bundle import BundleRequest, signature_path, write_bundle
    from engines.record import Precision as Wanted

    asked = Wanted(precision.value) if precision is not None else None
    made = write_bundle(
        BundleRequest(model=model, out=out, precision=asked, key=sign, source=source, port=port)
    )
    if sign is None:
        say("note: not signed; sign it with --sign KEY, so that devices can tell whose it is")
    if json:
        give_json(
            "edge-dsc/deploy-bundle-result", {"bundle": str(out), "signed": sign is not None, "content": made}
        )
        return
    give(f"{out}: {made.name}, {len(made.files)} files, built on the device with {' '.join(made.build)}")
    if sign is not None:
        give(str(signature_path(out)))


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle that deploy bundle wrote.", show_default=False)],
    key: Annotated[
        Optional[Path],
        typer.Option(
            "--key", help="Public keys of OpenSSH, one of which must have signed it.", show_default=False
        ),
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Look at the content alone.")] = False,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Unpack it to this folder.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """A bundle that was changed by a byte, or signed by another key, is refused; nothing of it is unpacked."""
    from edge_dsc.deploy.bundle import verify_bundle

    if (key is None) != unsigned:
        raise UsageError(
            "verify takes a key, or --unsigned where there is none",
            remedy="--key KEY.pub, of whoever packed it",
        )
    found = verify_bundle(bundle, key, out)
    if json:
        give_json(
            "edge-dsc/deploy-verify-result", {"bundle": str(bundle), "signed": not unsigned, "content": found}
        )
        return
    word = "sound, signature not looked at" if unsigned else f"sound, signed by {key}"
    give(f"{bundle}: {found.name}, {len(found.files)} files, {word}")
    if out is not None:
        give(f"sudo sh {out / 'install.sh'}")


def deepstream(
    engine: Engine,
    out: Annotated[Path, typer.Option("--out", help="The folder.")] = Path("runs/deepstream"),
    tensorrt: Annotated[
        str,
        typer.Option("--tensorrt", metavar="VERSION", help="For INT8: the pipeline's TensorRT, 8.6 to 10.x."),
    ] = "10.3.0",
    json: Json = False,
) -> None:
    """The engine's model with the float input that nvinfer gives, its labels, and for INT8 a calibration cache.

    nvinfer builds its own engine of it. What it computes from a frame of the network's size is, bit for bit, what the
    contract says; the lines on standard error say where a pipeline cannot be equal to infer.
    """
    from edge_dsc.deploy.deepstream import CONFIG, write_deepstream

    made = write_deepstream(engine, out, tensorrt=tensorrt)
    for limit in made.limits:
        say(f"not equal to infer: {limit}")
    if json:
        give_json("edge-dsc/deploy-deepstream-result", made)
    else:
        give(f"nvinfer config-file-path={out / CONFIG}")
