"""Start ranks on this host as a batch system does: python tests/start_ranks.py RANKS PORT PROGRAM [OPTIONS].

torchrun loads torch for this, which hundreds of launches of these tests would wait for. As there, the others get
SIGTERM where a rank fails, and are killed ten seconds later; the exit code is that of the first.
"""

import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 10


def main() -> int:
    """Start, wait, end."""
    ranks, port, *words = sys.argv[1:]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    for rank in range(int(ranks)):
        variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen([sys.executable, *words], env=variables))
    code, failed = 0, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.02)
        if not code and (code := next((process.returncode for process in processes if process.returncode), 0)):
            failed = time.monotonic()
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if code and time.monotonic() - failed > GRACE_SECONDS:
            for process in processes:
                process.kill()
    return code or next((process.returncode for process in processes if process.returncode), 0)


if __name__ == "__main__":
    sys.exit(main())
