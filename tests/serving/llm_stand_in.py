"""A stand-in for a language model's server with prompt embeddings: what vLLM's completions do, as far as it is asked here."""

import asyncio
import base64
import io
import json
import threading
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class StandIn:
    """The app; `behave` makes it misbehave: "busy", "refuse", "cut" (its stream ends early), "garbage", "slow"."""

    def __init__(self, folder):
        from starlette.applications import Starlette
        from starlette.routing import Route

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.behave, self.requests, self.finished = "", [], 0
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def models(self, request):
        from starlette.responses import JSONResponse

        return JSONResponse({"data": [{"id": "llm", "max_model_len": 900}]})

    async def complete(self, request):
        from starlette.responses import JSONResponse, StreamingResponse

        body = json.loads(await request.body())
        self.requests.append(body)
        if self.behave in ("busy", "refuse"):
            status = {"busy": 429, "refuse": 400}[self.behave]
            return JSONResponse({"error": {"message": f"I {self.behave}"}}, status)
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        embeds = torch.load(io.BytesIO(data), weights_only=True)
        assert embeds.ndim == 2
        banned = [int(token) for token, bias in body["logit_bias"].items() if bias <= -100]
        with torch.inference_mode():
            ids = self.model.generate(
                inputs_embeds=embeds[None], max_new_tokens=body["max_tokens"], do_sample=False, suppress_tokens=banned,
                eos_token_id=body["stop_token_ids"],
            )[0].tolist()  # fmt: skip
        return StreamingResponse(self.events(ids, body), media_type="text/event-stream")

    async def events(self, ids, body):
        ended = ids[-1] in body["stop_token_ids"]
        shown = ""
        for number in range(len(ids)):
            if self.behave == "slow":
                await asyncio.sleep(0.2)
            text = self.tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
            last = number == len(ids) - 1
            if self.behave == "cut" and last:
                return
            reason = ("stop" if ended else "length") if last else None
            choice = {"index": 0, "text": text[len(shown) :], "token_ids": [ids[number]], "finish_reason": reason}
            shown = text
            yield "data: garbage\n\n" if self.behave == "garbage" else f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(ids)}})}\n\n"
        yield "data: [DONE]\n\n"
        self.finished += 1


@contextmanager
def standing_in(folder):
    """(the stand-in, its address)."""
    import uvicorn

    stand_in = StandIn(folder)
    web = uvicorn.Server(uvicorn.Config(stand_in.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        thread.join(0.02)
    try:
        yield stand_in, f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(30)
