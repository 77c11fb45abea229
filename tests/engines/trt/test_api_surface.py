"""Every name of TensorRT that the code uses, held against the names that nine releases have."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "engines" / "trt").glob("*.py"))
SURFACE = json.loads((Path(__file__).parents[1] / "tensorrt_api.json").read_text())
RELEASES = SURFACE["releases"]
SINCE_10 = frozenset(range(1, 9))  # all but 8.6.1
SINCE_10_13 = frozenset(range(4, 9))
RTX_ONLY = frozenset({8})
SINCE_10_3 = frozenset(range(2, 9))
UNTIL_10 = frozenset(range(6))  # 8.6.1 to 10.16

# Names that not every release has: where they are used, and the releases that have them.
EXCEPTIONS = {
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": SINCE_10,
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": UNTIL_10,
    "BuilderFlag.FP16": UNTIL_10,
    "BuilderFlag.INT8": UNTIL_10,
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": UNTIL_10,
    "BuilderFlag.REQUIRE_USER_ALLOCATION": RTX_ONLY,
    "ILayer.precision": UNTIL_10,
    "ILayer.precision_is_set": UNTIL_10,
    "IBuilderConfig.progress_monitor": SINCE_10,
    "IBuilderConfig.int8_calibrator": UNTIL_10,
    "IBuilderConfig.set_calibration_profile": UNTIL_10,
    "ParserError.node_name": SINCE_10,
    "ParserError.node_operator": SINCE_10,
    "PreviewFeature.PROFILE_SHARING_0806": UNTIL_10,
    "DynamicShapesKernelSpecializationStrategy": RTX_ONLY,
    "DynamicShapesKernelSpecializationStrategy.EAGER": RTX_ONLY,
    "ICudaEngine.create_runtime_config": SINCE_10_13,
    "ICudaEngine.create_execution_context_without_device_memory": UNTIL_10,
    "ICudaEngine.device_memory_size": UNTIL_10,
    "ICudaEngine.device_memory_size_v2": SINCE_10_3,
    "ExecutionContextAllocationStrategy": SINCE_10,
    "ExecutionContextAllocationStrategy.USER_MANAGED": SINCE_10,
    "IRuntimeConfig.set_execution_context_allocation_strategy": SINCE_10_13,
    "IExecutionContext.update_device_memory_size_for_shapes": SINCE_10,
    "IExecutionContext.set_device_memory": SINCE_10_3,
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": RTX_ONLY,
    "IRuntimeConfig.create_runtime_cache": RTX_ONLY,
    "IRuntimeConfig.set_runtime_cache": RTX_ONLY,
    "IExecutionContext.is_stream_capturable": RTX_ONLY,
    "IProgressMonitor": SINCE_10,
    "IProgressMonitor.phase_start": SINCE_10,
    "IProgressMonitor.step_complete": SINCE_10,
    "IProgressMonitor.phase_finish": SINCE_10,
}

# Names by which the code calls TensorRT's objects, as variables or, with an underscore, as attributes of self.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "execution": "IExecutionContext",
    "inspector": "EngineInspector",
    "parser_error": "ParserError",
    "layer": "ILayer",
    "tensor": "ITensor",
    "tensors[0]": "ITensor",
    "kinds": "NetworkDefinitionCreationFlag",
    "runtime_config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
}
RETURNS = {"get_error": "ParserError", "get_layer": "ILayer", "get_input": "ITensor", "get_output": "ITensor"}

RTX_FILE = "cache.py"  # nothing in it runs with another release


@dataclass(frozen=True)
class Use:
    name: str  # Class or Class.member
    where: str  # file:line
    guarded: bool  # in versions.py, in a function that asks what the release has


def releases_with(name: str) -> frozenset[int]:
    owner, _, member = name.partition(".")
    found = SURFACE["classes"].get(owner, {}).get(member, [])
    return frozenset(range(len(RELEASES))) if found == "all" else frozenset(found)


def uses(source: str, file: str) -> Iterator[Use]:
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    functions += [
        node
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    ]
    for function in functions:
        names = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        guarded = file == "versions.py" and bool(names & {"hasattr", "is_strongly_typed"})
        ours = {
            argument.arg
            for argument in (*function.args.args, *function.args.kwonlyargs)
            if argument.annotation is not None and ast.unparse(argument.annotation) != "Any"
        }
        for node in ast.walk(function):
            for name in names_of(node, ours):
                yield Use(name, f"{file}:{getattr(node, 'lineno', 0)}", guarded)


def names_of(node: ast.AST, ours: set[str]) -> list[str]:
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base).removeprefix("trt.") for base in node.bases]
        methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
        return [f"{base}.{method}" for base in bases for method in methods if not method.startswith("_")]
    if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
        return []
    value = node.value
    if isinstance(value, ast.Name) and value.id == "trt":
        return [node.attr]
    if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "trt":
        return [f"{value.attr}.{node.attr}"]
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in RETURNS:
        return [f"{RETURNS[value.func.attr]}.{node.attr}"]
    called = ast.unparse(value)
    if called in OBJECTS and called not in ours:
        return [f"{OBJECTS[called]}.{node.attr}"]
    if called.startswith("self._") and called.removeprefix("self._") in OBJECTS:
        return [f"{OBJECTS[called.removeprefix('self._')]}.{node.attr}"]
    return []


def faults(source: str, file: str) -> list[str]:
    found = []
    for use in uses(source, file):
        having = releases_with(use.name)
        if len(having) == len(RELEASES):
            continue
        if use.guarded and use.name in EXCEPTIONS:
            continue
        if file == RTX_FILE and having == RTX_ONLY:
            continue
        missing = ", ".join(RELEASES[index] for index in range(len(RELEASES)) if index not in having)
        found.append(f"{use.where} uses {use.name}, which is not in {missing}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_name_is_in_every_release(path: Path) -> None:
    assert faults(path.read_text(), path.name) == []


def test_the_exceptions_are_what_the_releases_say_and_all_are_used() -> None:
    assert {name: releases_with(name) for name in EXCEPTIONS} == EXCEPTIONS
    used = {use.name for path in FILES for use in uses(path.read_text(), path.name)}
    assert set(EXCEPTIONS) <= used


def test_the_walk_sees_what_the_code_uses() -> None:
    used = {use.name for path in FILES for use in uses(path.read_text(), path.name)}
    assert used > {
        "Builder.build_serialized_network",
        "ParserError.desc",
        "INetworkDefinition.get_layer",
        "ILayer.get_input",
        "ITensor.dtype",
        "IBuilderConfig.set_memory_pool_limit",
        "MemoryPoolType.WORKSPACE",
        "IOptimizationProfile.set_shape",
        "Runtime.deserialize_cuda_engine",
        "EngineInspector.get_engine_information",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.active_optimization_profile",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.serialize",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.set_tensor_address",
        "ICudaEngine.get_tensor_dtype",
        "ILogger.log",
        "IProfiler.report_layer_time",
        "IExecutionContext.profiler",
    }


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("trt.Bilder(logger)", "Bilder"),
        ("trt.LayerType.CONVOLUTON", "LayerType.CONVOLUTON"),
        ("builder.build_engine(network)", "Builder.build_engine"),
        ("parser.get_error(0).description()", "ParserError.description"),
        ("self._execution.execute_async_v2()", "IExecutionContext.execute_async_v2"),
    ],
)
def test_a_name_that_some_release_lacks_is_found(line: str, name: str) -> None:
    source = f"def build(trt: Any, builder: Any, parser: Any) -> None:\n    {line}\n"
    assert faults(source, "build.py")[0].startswith(f"build.py:2 uses {name}, which is not in ")


def test_an_exception_counts_only_behind_a_question() -> None:
    source = "def flag(trt: Any) -> None:\n    {}trt.BuilderFlag.FP16\n"
    assert faults(source.format("if hasattr(trt.BuilderFlag, 'FP16'): "), "versions.py") == []
    assert faults(source.format(""), "versions.py") != []
    assert faults(source.format("if hasattr(trt.BuilderFlag, 'FP16'): "), "build.py") != []


def test_the_surfaces_are_of_nine_releases_and_small() -> None:
    assert RELEASES[0] == "tensorrt-8.6.1"
    assert RELEASES[-1] == "tensorrt_rtx-1.7.1"
    assert len(RELEASES) == 9
