"""Dump one engine into an image and restore it from one: CRIU, image store and tree together."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swapserve.errors import CriuError, ImageError, KeeperError
from swapserve.keeper import sandbox
from swapserve.keeper.context import Context
from swapserve.keeper.criu import Criu
from swapserve.keeper.images import (
    MANIFEST_VERSION,
    Manifest,
    fingerprint,
    identity,
    size_of,
)
from swapserve.keeper.network import Network
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place
from swapserve.keeper.protocol import ImageKind, VerbReport
from swapserve.keeper.sandbox import SandboxSpec
from swapserve.keeper.tree import EngineTree
from swapserve.system import process
from swapserve.system.process import ProcessRef


class Checkpoints:
    """The images of one engine. `later` runs work that nobody waits for."""

    def __init__(
        self,
        place: Place,
        tree: EngineTree,
        context: Context,
        *,
        later: Callable[[Awaitable[None]], None],
    ) -> None:
        self._place = place
        self._name = place.model.name
        self._tree = tree
        self._context = context
        self._images = context.images
        self._later = later

    def golden(self) -> Manifest | None:
        """Return the golden image's manifest if it still fits (blocks for milliseconds)."""
        if not self._place.can_dump:
            return None
        wanted = self._fingerprint(self._place.spec())
        return self._images.valid(self._place.slug, "golden", wanted)

    def live(self) -> Manifest | None:
        """Return the live image's manifest, None if there is none."""
        return self._images.manifest(self._place.slug, "live")

    def gpu_state(self, kind: ImageKind) -> tuple[tuple[str, ...], dict[str, int]]:
        """Return the GPUs that an image's state is of, and what it takes of each; empty if none."""
        manifest = self._images.manifest(self._place.slug, kind)
        return (manifest.gpus, manifest.device_bytes) if manifest else ((), {})

    async def drop(self, kind: ImageKind) -> None:
        """Delete an image; harmless if there is none."""
        path = self._images.path(self._place.slug, kind)
        await asyncio.to_thread(self._images.drop, path)

    async def mark_canary_passed(self) -> None:
        """Note that a restore of the present golden image answered as it should."""
        manifest = await asyncio.to_thread(self.golden)
        if manifest is not None:
            self._images.mark_canary_passed(self._place.slug, manifest)

    async def dump(
        self, kind: ImageKind, canary: dict[str, Any] | None, phases: Phases
    ) -> VerbReport:
        """Write an image (see `HeldEngine.dump`)."""
        criu, network = self._tools()
        ref = self._tree.root
        assert ref is not None
        images, spec = self._images, self._place.spec()
        with phases.phase("prepare"):
            staging, files = await asyncio.to_thread(self._stage, kind, ref.pid, spec)
        if self._tree.frozen and self._place.group is None:
            await self._tree.freeze(False)  # what a signal had stopped would come back stopped
        self._tree.expect_end(kind == "live")
        group = self._place.group if self._tree.frozen else None
        try:
            with phases.phase("dump"):
                await criu.dump(
                    self._name,
                    ref.pid,
                    staging / "criu",
                    netns_inode=network.inode,
                    binds=spec.binds,
                    leave_running=kind == "golden",
                    frozen_group=group.path if group else None,
                    timeout_s=self._context.config.keeper.dump_timeout_s,
                )
        except CriuError as error:
            self._tree.expect_end(False)
            await asyncio.to_thread(images.drop, staging)
            if error.killed:
                await network.unlock(self._context.nft)
            raise
        with phases.phase("commit"):
            size = await asyncio.to_thread(size_of, staging)
            manifest = Manifest(
                version=MANIFEST_VERSION,
                engine=self._name,
                kind=kind,
                fingerprint=self._fingerprint(spec),
                files=files,
                binds={bind.key: bind.source for bind in spec.binds},
                bytes=size,
                canary=canary,
                device_bytes=self._tree.device_bytes if self._place.model.gpus else {},
                gpus=self._tree.gpus,
            )
            await asyncio.to_thread(images.commit, staging, self._place.slug, manifest)
        if kind == "live":
            with phases.phase("reap"):
                await self._tree.gone()
        return phases.report(size)

    async def restore(self, kind: ImageKind, phases: Phases) -> VerbReport:
        """Bring the engine back (see `HeldEngine.restore`)."""
        criu, network = self._tools()
        spec = await self._place.prepare(phases)
        with phases.phase("validate"):
            manifest, directory = await asyncio.to_thread(self._take_image, kind, spec)
        try:
            with phases.phase("restore"), self._context.huge_pages.during_restore():
                pid = await criu.restore(
                    self._name,
                    directory / "criu",
                    pidfile=self._place.dir / "pid",
                    netns=network.path,
                    binds=manifest.binds,
                    root=self._place.root,
                    group=self._place.group,
                    timeout_s=self._context.config.keeper.restore_timeout_s,
                )
            with phases.phase("verify"):
                gpu = manifest.device_bytes if self._place.model.gpus else None
                self._tree.adopt(
                    ProcessRef.of(pid), restored_from=kind, device_bytes=gpu, gpus=manifest.gpus
                )
                await asyncio.to_thread(self._tree.gather)
        except (CriuError, ProcessLookupError, OSError) as error:
            await self._clear_after_failed_restore(network)
            if isinstance(error, CriuError):
                raise
            raise CriuError(self._name, "restore", str(error)) from error
        finally:
            if kind == "live":
                # Off the way of the first token: the bytes go while the engine already answers.
                self._later(asyncio.to_thread(self._images.drop, directory))
        return phases.report(manifest.bytes)

    def _take_image(self, kind: ImageKind, spec: SandboxSpec) -> tuple[Manifest, Path]:
        images = self._images
        name = self._name
        if kind == "golden":
            manifest = images.valid(self._place.slug, kind, self._fingerprint(spec))
            if manifest is None:
                raise ImageError(name, "restore", "there is no golden image that still fits")
            return manifest, images.path(self._place.slug, kind)
        manifest = images.manifest(self._place.slug, kind)
        if manifest is None:
            raise ImageError(name, "restore", "there is no live image")
        return manifest, images.consume_live(self._place.slug)

    async def _clear_after_failed_restore(self, network: Network) -> None:
        await self._tree.kill()
        await network.unlock(self._context.nft)

    def _tools(self) -> tuple[Criu, Network]:
        criu, network = self._context.criu, self._place.network
        if criu is None or network is None:
            why = self._context.criu_missing if network else "it has no sandbox"
            raise KeeperError(f"no image of '{self._name}' is possible: {why}")
        return criu, network

    def _stage(self, kind: ImageKind, root: int, spec: SandboxSpec) -> tuple[Path, dict[str, str]]:
        """Make room, and note every mapped file as it is now."""
        try:
            need = process.memory(root).dump
        except ProcessLookupError as error:
            raise KeeperError(f"'{self._name}' has just ended") from error
        staging = self._images.stage(self._place.slug, kind, engine=self._name, need_bytes=need)
        return staging, self._mapped(root, spec)

    def _fingerprint(self, spec: SandboxSpec) -> str:
        criu = self._context.criu
        cuda = self._context.cuda
        if self._place.model.gpus and cuda is not None and cuda.remaps:
            # Its state can come back to other GPUs of the same kind.
            spec = replace(spec, env={**spec.env, "CUDA_VISIBLE_DEVICES": ""})
        return fingerprint(
            spec,
            recipe=self._place.model.recipe.name,
            files=sandbox.model_files(self._place.model),
            versions={"criu": criu.version if criu else "", **self._cuda_versions()},
        )

    def _cuda_versions(self) -> dict[str, str]:
        """Return the driver and the kinds of GPU that an engine depends on."""
        cuda = self._context.cuda if self._place.model.gpus else None
        if cuda is None:
            return {}
        kinds = self._context.kinds(self._place.model.gpus)
        return {"driver": cuda.driver or "", "gpus": ", ".join(kinds)}

    def _mapped(self, root: int, spec: SandboxSpec) -> dict[str, str]:
        """Return the identity of every host file that the tree has mapped, by host path."""
        sources = {Path(bind.target): Path(bind.source) for bind in spec.binds}
        files: dict[str, str] = {}
        for inside in map(Path, process.mapped_files(root)):
            target = next((up for up in (inside, *inside.parents) if up in sources), None)
            if target is not None:  # else it is in a tmpfs, and so in the image
                path = sources[target] / inside.relative_to(target)
                files[str(path)] = identity(path)
        return files
