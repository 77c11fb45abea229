"""What Triton's Python backend runs: our runner behind a model, and a front that takes whole files.

Arrays go to and from Triton by DLPack alone. A Python backend that was compiled for NumPy 1, as that of release 24.10,
takes the element size of NumPy 2's arrays for 0: it would read one pixel everywhere and send nothing. DLPack has no
strings, so files and labels are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_dsc.deploy.triton import ENGINE_KEY, FRONT_INPUT, LEVELS_KEY, MODEL_KEY, UNSURE_KEY
from edge_dsc.infer.classify import Answer, Prepared, answer_group
from edge_dsc.infer.live_page.monitoring import InputDrift
from engines.errors import EdgeDscError, ImageError, UnansweredError
from engines.images import (
    count_levels,
    decode_image,
    prepare_pixels,
    quiet_decoder,
    require_decoder,
    usable_processors,
)
from engines.packages import load
from engines.record import EngineRecord, load_record
from engines.runtimes import DirectSubmission, open_engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engines.images import InputPixels

_MODULE = "triton_python_backend_utils"  # there in Triton's own processes alone


class EngineModel:
    """A model that takes pixels: our runner, opened as on any machine, with all its checks."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine.

        Raises:
            pb_utils.TritonModelException: It is refused; the server then says why the model is not ready.
        """
        self._triton = load(_MODULE)
        engine, _ = _engine_of(args)
        with _Refused(self._triton):
            self._runner = open_engine(engine)
        self._contract = self._runner.record.contract

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of a batch."""
        triton, contract = self._triton, self._contract
        given = [
            _array(triton.get_input_tensor_by_name(request, contract.input_name)) for request in requests
        ]
        try:
            found = self._answer(given)
        except EdgeDscError as error:
            refused = triton.TritonError(str(error))
            return [triton.InferenceResponse(error=refused) for _ in requests]
        names = [name for name, _ in contract.outputs]
        return [
            triton.InferenceResponse([_tensor(triton, *pair) for pair in zip(names, values, strict=True)])
            for values in found
        ]

    def _answer(self, given: Sequence[InputPixels]) -> list[Sequence[NDArray[np.float32]]]:
        """Return every output of each request.

        A device takes all pictures as one batch. A processor takes one after the other, as ``infer`` does: in batches
        of four a picture of ``dsc`` took a fifth longer, and an answer must not depend on who else asks.
        """
        if self._runner.thread_safe:
            return [self._run_each(batch) for batch in given]
        ends = np.cumsum([len(batch) for batch in given])[:-1]
        found = self._run(given[0] if len(given) == 1 else np.concatenate(given))
        return list(zip(*(np.split(values, ends) for values in found), strict=True))

    def _run_each(self, batch: InputPixels) -> Sequence[NDArray[np.float32]]:
        if len(batch) == 1:
            return self._run(batch)
        each = [self._run(batch[index : index + 1]) for index in range(len(batch))]
        return [np.concatenate(values) for values in zip(*each, strict=True)]

    def _run(self, batch: InputPixels) -> Sequence[NDArray[np.float32]]:
        """Return every output that the contract names."""
        return [self._runner.run(batch)] if self._contract.cam is None else self._runner.explain(batch)

    def finalize(self) -> None:
        """Free the engine."""
        self._runner.close()


class FrontModel:
    """A model that takes whole files, as ``infer`` does, asks the one that takes pixels, and counts the answers.

    A request is one file, ``uint8 [1, bytes]``. One that is no picture fails alone, and the failure says why. Where
    the repository knows the grey levels of the calibration's images, each copy says how far its pictures are from them.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Check the engine's record and its content, and register the metrics.

        Raises:
            pb_utils.TritonModelException: The engine is not that of its record, or a decoder is missing.
        """
        self._triton = load(_MODULE)
        engine, parameters = _engine_of(args)
        with _Refused(self._triton):
            record = load_record(engine)  # hashes the plan, which Triton loads by itself
            require_decoder(record.contract)
        quiet_decoder()
        self._model = _AskedModel(self._triton, parameters[MODEL_KEY], record)
        self._labels = record.contract.labels
        self._largest = record.batch.largest
        self._pool = ThreadPoolExecutor(usable_processors(), thread_name_prefix="decode")
        self._count = _Metrics(self._triton, args["model_instance_name"], parameters, self._labels)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Decode the files of all requests in threads, ask for them in batches, and give each request its answer."""
        given = [_array(self._triton.get_input_tensor_by_name(request, FRONT_INPUT)) for request in requests]
        pictures = list(self._pool.map(self._prepare, given))
        answers: list[Answer] = []
        for first in range(0, len(pictures), self._largest):
            answers += answer_group(pictures[first : first + self._largest], self._model)
        self._count(answers)
        return [self._respond(answer) for answer in answers]

    def finalize(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _prepare(self, data: NDArray[np.uint8]) -> Prepared:
        contract = self._model.record.contract
        try:
            if len(data) != 1:
                raise ImageError(f"{len(data)} files came in one request", remedy="give one file a request")
            decoded = decode_image(data.tobytes(), contract, name="the file")
            pixels = prepare_pixels(decoded, contract, name="the file")
            levels = count_levels(pixels, contract) if self._count.drifts else None
            return Prepared("", pixels, 0.0, levels=levels)
        except ImageError as error:
            return Prepared("", error, 0.0)
        except (
            EdgeDscError
        ) as error:  # DICOM without pydicom: the other files of the batch have their answers
            return Prepared("", ImageError(error.what, remedy=error.remedy), 0.0)

    def _respond(self, answer: Answer) -> Any:
        triton, top = self._triton, answer.top
        if answer.probabilities is None or top is None:
            kind = triton.TritonError.UNAVAILABLE if answer.unanswered else triton.TritonError.INVALID_ARG
            return triton.InferenceResponse(error=triton.TritonError(answer.error or "", kind))
        row = np.array([answer.probabilities], np.float32)
        outputs: dict[str, NDArray[Any]] = {
            "label": np.frombuffer(bytearray(self._labels[top].encode()), np.uint8)[None],
            "probability": row[:, top : top + 1],
            "probabilities": row,
        }
        return triton.InferenceResponse([_tensor(triton, name, values) for name, values in outputs.items()])


class _Refused:
    """Turns our errors into the one that Triton shows as the reason why a model is not ready."""

    def __init__(self, triton: Any) -> None:
        self._triton = triton

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Translate."""
        if isinstance(error, EdgeDscError):
            raise self._triton.TritonModelException(str(error)) from error


class _AskedModel(DirectSubmission):
    """The model that takes pixels, asked inside the server: a runner like any other."""

    thread_safe = False
    description: Mapping[str, str] = {"execution": "Triton, inside"}

    def __init__(self, triton: Any, name: str, record: EngineRecord) -> None:
        self.record = record
        self._triton, self._name = triton, name
        self._memory = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Ask the model.

        Raises:
            UnansweredError: It gave no answer.
        """
        triton, contract = self._triton, self.record.contract
        asked = triton.InferenceRequest(
            model_name=self._name,
            requested_output_names=[contract.output_name],
            inputs=[_tensor(triton, contract.input_name, batch)],
            preferred_memory=self._memory,
        )
        try:
            response = asked.exec()
        except triton.TritonModelException as error:
            raise UnansweredError(
                f"{self._name} gave no answer: {error}", remedy="see the server's log"
            ) from error
        if response.has_error():
            raise UnansweredError(
                f"{self._name} gave no answer: {response.error().message()}", remedy="see the server's log"
            )
        answers: NDArray[np.float32] = _array(
            triton.get_output_tensor_by_name(response, contract.output_name)
        )
        kept: NDArray[np.float32] = answers.copy()  # the response's own memory goes with it
        return kept

    def close(self) -> None:
        """Do nothing: the server owns the model."""

    def __enter__(self) -> _AskedModel:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


class _Metrics:
    """Our metrics on Triton's own Prometheus port; the copies of a model add to the same counters.

    Attributes:
        drifts: Whether answers are to bring the grey levels of their pictures.
    """

    def __init__(self, triton: Any, copy: str, parameters: Mapping[str, str], labels: Sequence[str]) -> None:
        kinds = triton.MetricFamily

        def family(name: str, description: str, kind: Any = kinds.COUNTER) -> Callable[..., Any]:
            made = kinds(name=name, description=description, kind=kind)
            self._families.append(made)  # it goes with its last reference
            return lambda more: made.Metric(labels={"model": parameters[MODEL_KEY], **more})

        self._families: list[Any] = []
        self._threshold = float(parameters[UNSURE_KEY])
        self.drifts = LEVELS_KEY in parameters
        if self.drifts:
            self._input = InputDrift(np.array(json.loads(parameters[LEVELS_KEY]), np.int64))
            # What a copy has seen of the traffic is its own: a gauge of all of them would jump.
            self._drift = family("edge_dsc_input_drift_psi", self._input.description, kinds.GAUGE)(
                {"copy": copy}
            )
            self._drift.set(self._input.value())
        answers = family("edge_dsc_answers_total", "Pictures by their most probable class")
        errors = family(
            "edge_dsc_errors_total", "Pictures without an answer: no picture, or none from the model"
        )
        unsure_ones = family("edge_dsc_unsure_total", "Answers whose best class stays under the threshold")
        # Made here, not at the first answer: a counter that begins above 0 has no rate.
        self._answers = [answers({"label": label}) for label in labels]
        self._errors = {reason: errors({"reason": reason}) for reason in ("picture", "model")}
        self._unsure = unsure_ones({"threshold": f"{self._threshold:g}"})

    def __call__(self, answers: Sequence[Answer]) -> None:
        """Count answers."""
        for levels in (answer.levels for answer in answers if answer.levels is not None):
            self._input.add(levels)
        if self.drifts:
            self._drift.set(self._input.value())
        for answer in answers:
            if answer.probabilities is None or answer.top is None:
                self._errors["model" if answer.unanswered else "picture"].increment(1)
                continue
            self._answers[answer.top].increment(1)
            if answer.probabilities[answer.top] < self._threshold:
                self._unsure.increment(1)


def _engine_of(args: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """Return the engine's path and the parameters, from what Triton hands to a model."""
    config = json.loads(args["model_config"])
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    repository = Path(args["model_repository"])  # in spite of its name the model's own folder
    return repository.parent / parameters[ENGINE_KEY], parameters


def _array(tensor: Any) -> Any:
    """Return a tensor of Triton as an array that shares its memory."""
    return np.from_dlpack(tensor)


def _tensor(triton: Any, name: str, values: NDArray[Any]) -> Any:
    """Return an array as a tensor of Triton."""
    return triton.Tensor.from_dlpack(name, np.ascontiguousarray(values))
