"""The whole examination of a launch: each host by itself, then all together, as far as they come."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ecp_scale.cluster.last_words import before_leaving
from ecp_scale.cluster.meeting import Meeting
from ecp_scale.cluster.ranks import Ranks
from ecp_scale.cluster.rendezvous import rendezvous
from ecp_scale.config import ParallelConfig
from ecp_scale.doctor.findings import Finding, Placed, bad, has_bad, note
from ecp_scale.doctor.folder import shared_folder
from ecp_scale.doctor.host import examine_host
from ecp_scale.doctor.together import arithmetic, clock, messages
from ecp_scale.doctor.training import train_two_steps
from ecp_scale.errors import InputError, LostRankError, is_first_of_host
from ecp_scale.parallel.device import backend, gpu_identity, local_device
from ecp_scale.parallel.groups import Groups, everyone, process_groups


class _UnfitError(Exception):
    """A host cannot take part."""


class Examination:
    """What has been found so far; all ranks of the launch make one, and the first one has it all."""

    def __init__(self, folder: Path | None, timeout_seconds: int) -> None:
        """Args:
        folder: where runs are to lie.
        timeout_seconds: how long a rank is waited for.
        """
        self.found: list[Placed] = []
        self._folder = folder
        self._timeout = timeout_seconds
        self._host = socket.gethostname()

    def examine(self, show: Callable[[], None] = lambda: None) -> None:
        """Look at everything; what cannot go on ends as a finding.

        Args:
            show: called where this process ends in the middle, because another rank is lost.
        """
        try:
            device, trouble = local_device(Ranks.from_environment().local_rank), []
        except (InputError, RuntimeError) as error:
            device, trouble = torch.device("cpu"), [bad("devices", str(error))]
        alone = [*examine_host(backend(device)), *trouble] if is_first_of_host() else trouble
        self.found = [Placed(self._host, finding) for finding in alone]
        kind = backend(device)
        on_gpu = device if device.type == "cuda" else None
        try:
            if "RANK" not in os.environ and has_bad(self.found):
                raise _UnfitError
            with (
                before_leaving(show, at_exit=True),
                rendezvous(kind, self._timeout, gpu_identity(device), on_gpu, lambda met: self._share(met, kind)),
                process_groups(ParallelConfig(), device=device) as groups,
            ):
                self._together(groups)
        except _UnfitError:
            self.found.append(Placed(self._host, note("launch", "the hosts together were not looked at")))
        except (
            LostRankError,
            RuntimeError,
            InputError,
            OSError,
        ) as error:  # of a collective, an allocation, or DeepSpeed
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.found.append(Placed(self._host, bad("launch", f"has ended here: {said}")))

    def _share(self, meeting: Meeting, kind: str) -> None:
        """What hosts say of themselves: where a card is wrong, ranks could not connect to tell it."""
        mine = json.dumps([kind, self.found])
        told = json.loads(meeting.decided("doctor", mine, lambda all_of: json.dumps(all_of), self._timeout))
        kinds, found = zip(*map(json.loads, told), strict=True)
        self.found = [Placed(place, Finding(*finding)) for of_rank in found for place, finding in of_rank]
        first = next((finding.text for _, finding in self.found if finding.check == "libraries"), "")
        for place, finding in list(self.found):
            if finding.check == "libraries" and finding.text != first:
                self.found.append(Placed(place, bad("libraries", f"not those of the first host, {first}")))
        unlike = [rank for rank, other in enumerate(kinds) if other != kinds[0]]
        if unlike:
            text = f"ranks {', '.join(map(str, unlike[:8]))} would use {kinds[unlike[0]]}, the first rank {kinds[0]}"
            self.found.append(Placed(self._host, bad("devices", text)))
        if has_bad(self.found):
            raise _UnfitError

    def _together(self, groups: Groups) -> None:
        hosts, name = everyone(self._host), f"rank {dist.get_rank()} on {self._host}"
        self._add(self._host, [clock()])
        if self._folder is not None:
            self._add(self._host, shared_folder(self._folder))
        self._add(name, arithmetic(groups.device))
        self._add(name, messages(groups.device, hosts))
        self._add(name, [train_two_steps(groups)])

    def _add(self, place: str, findings: list[Finding]) -> None:
        """Share what every rank has found, so that it is not lost with what comes after."""
        self.found += [one for of_rank in everyone([Placed(place, one) for one in findings]) for one in of_rank]
