"""The connector with a fault at an exact place: between the match and the load a signal goes to a process."""

from __future__ import annotations

import os
import signal
from typing import Any

from kvstore.integrations.vllm.connector import KVStoreConnector
from tests.engines.harness import VICTIM


class KillsBeforeLoading(KVStoreConnector):
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        path = os.environ[VICTIM]
        if num_external_tokens > 0 and os.path.exists(path):
            with open(path) as file:
                pid = int(file.read())
            os.unlink(path)
            os.kill(pid, signal.SIGKILL)
            with open(path + ".done", "w") as file:
                file.write(str(pid))
