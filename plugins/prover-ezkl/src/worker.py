"""Speaks for the ezkl wheel: one JSON line in, one JSON line out.

Started by the plugin as `python -I -c THIS parent-pid memory-bytes`. Requests and answers keep to descriptors 0 and 1; whatever the
wheel itself prints goes to standard error.
"""

import asyncio
import ctypes
import json
import os
import resource
import signal
import sys
import time


def end_with_parent(parent):
    """The thread that started this process ends with the plugin: then the kernel ends this one."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def settled(function, *arguments):
    """Some functions of the wheel answer at once; some answer with something to wait for, and want to be called where one can."""

    async def wait():
        result = function(*arguments)
        return await result if hasattr(result, "__await__") else result

    return asyncio.run(wait())


def load(path):
    with open(path) as file:
        return json.load(file)


def dump(value, path):
    with open(path, "w") as file:
        json.dump(value, file)


def circuit(onnx, settings, compiled, scale, base, legs, range_checks, k, variables, calibration):
    """Settles the circuit's shape and compiles it."""
    args = ezkl.PyRunArgs()
    args.input_visibility = "hashed"
    args.output_visibility = "public"
    args.param_visibility = "fixed"
    args.input_scale = scale
    args.param_scale = scale
    args.decomp_base = base
    args.decomp_legs = legs
    args.ignore_range_check_inputs_outputs = not range_checks
    args.variables = [tuple(pair) for pair in variables]
    if k is not None:
        args.logrows = k
    ezkl.gen_settings(onnx, settings, args)
    if calibration is not None:
        settled(ezkl.calibrate_settings, calibration, onnx, settings, "resources", 2.0, [scale], [1], None)
    ezkl.compile_circuit(onnx, compiled, settings)
    made = load(settings)
    # The moment of its making would give every circuit another hash.
    made["timestamp"] = 0
    dump(made, settings)
    return {
        "k": made["run_args"]["logrows"],
        "rows": made["num_rows"],
        "inputs": made["model_input_scales"],
        "outputs": made["model_output_scales"],
        "shapes": made["model_instance_shapes"],
    }


def srs(path, k):
    ezkl.gen_srs(path, k)


def setup(compiled, vk, pk, srs):
    ezkl.setup(compiled, vk, pk, srs, None, False)


def vka(vk, settings, vka, srs):
    settled(ezkl.create_evm_vka, vk, settings, vka, srs)


def witness(inputs, data, compiled, witness, vk, srs):
    dump({"input_data": inputs}, data)
    made = settled(ezkl.gen_witness, data, compiled, witness, vk, srs)
    return {"outputs": made["outputs"]}


def prove(witness, compiled, pk, proof, srs):
    made = settled(ezkl.prove, witness, compiled, pk, proof, srs)
    return {"instances": made["instances"][0], "proof": made["proof"].removeprefix("0x")}


def poseidon(message):
    return ezkl.poseidon_hash(message)[0]


REFUSED = (
    "[halo2] The constraint system is not satisfied",
    "[halo2] Multi-opening proof was invalid",
    "[halo2] Transcript error",
    "[halo2] Provided instances do not match the circuit",
)


def verify(instances, proof, file, settings, vk, srs):
    """Checks a proof for these instances: a proof's file holds none but them."""
    dump(
        {"protocol": None, "instances": [instances], "proof": list(bytes.fromhex(proof)), "hex_proof": "0x" + proof,
         "split": None, "pretty_public_inputs": None, "timestamp": 0, "version": ezkl.__version__},
        file,
    )
    try:
        return {"holds": ezkl.verify(file, settings, vk, srs, False) is True}
    except MemoryError:
        raise
    except BaseException as error:
        # What the proof system itself says of a proof. Everything else, such as keys that cannot be read, says nothing about it.
        if not any(verdict in str(error) for verdict in REFUSED):
            raise
        return {"holds": False, "why": str(error)[:300]}


def version():
    return ezkl.__version__


OPERATIONS = {each.__name__: each for each in (circuit, srs, setup, vka, witness, prove, poseidon, verify, version)}


def peak():
    """The most memory that was resident since the last call, in bytes."""
    try:
        with open("/proc/self/status") as file:
            found = [int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM")]
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return found[0]
    except (OSError, IndexError):
        return None


def answer(line):
    request = json.loads(line)
    began = time.process_time()
    peak()
    try:
        result = {"ok": OPERATIONS[request["do"]](**request["with"])}
    # The wheel's panics are no Exception.
    except BaseException as error:
        result = {"error": str(error)[:2000], "memory": isinstance(error, MemoryError)}
    result["cpu_ms"] = round((time.process_time() - began) * 1000)
    result["peak"] = peak()
    return result


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
end_with_parent(int(sys.argv[1]))
# A terminal's Ctrl-C reaches every process of the node, which ends this one when it has no more use for it.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))

import ezkl  # noqa: E402  Under the limit, and with descriptor 1 out of its reach.

for line in sys.stdin:
    answers.write(json.dumps(answer(line)) + "\n")
    answers.flush()

# Without the interpreter's own end, which threads of the wheel may not survive.
os._exit(0)
