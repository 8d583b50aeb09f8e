"""Rank 0 of every trainer at once: GET /progress answers that it is at step 4, for ever.

python bench/played_trainer.py ADDRESS, the one that kwok.yaml gives to every pod. KWOK plays what the API server sees
of a pod, and no container that answers at its address, so this is left to play.
"""

import asyncio
import sys

from aiohttp import web

from distill_api.protocol import TRAINER_PORT, Phase, ProgressReport
from distill_api.status import Progress


async def main(address: str) -> None:
    progress = Progress(step=4, total_steps=10, percent=40)
    report = ProgressReport(phase=Phase.TRAINING, preflight_passed=True, progress=progress)
    body = report.model_dump_json(by_alias=True)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/progress", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, address, TRAINER_PORT).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
