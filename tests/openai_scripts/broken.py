"""What the client does where the server goes away, or says that it broke.

`stream PID TOKEN` ends the server in the middle, `create FILE` is not heard; `told sync|async` reads a stream in which
an error is told.
"""

import asyncio
import os
import signal
import sys

import openai

client = openai.OpenAI()

ask = [{"role": "user", "content": "go on for ever"}]


async def unsync() -> None:
    async for chunk in await openai.AsyncOpenAI().chat.completions.create(model="tiny", messages=ask, stream=True):
        print("came", chunk.id)


if sys.argv[1] == "told":
    try:
        if sys.argv[2] == "async":
            asyncio.run(unsync())
        else:
            for chunk in client.chat.completions.create(model="tiny", messages=ask, stream=True):
                print("came", chunk.id)
    except openai.APIError as error:
        print("raised", error.code, error.message)
    else:
        print("looked whole")
elif sys.argv[1] == "stream":
    stream = client.chat.completions.create(
        model="tiny", messages=ask, stream=True, logit_bias={sys.argv[3]: -100}, max_tokens=1500
    )
    came = 0
    try:
        for chunk in stream:
            came += len(chunk.choices[0].delta.content or "")
            if came > 5:
                os.kill(int(sys.argv[2]), signal.SIGKILL)
    except Exception as error:
        print("raised", type(error).__name__)
    else:
        print("looked whole")
else:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=sys.argv[2], suffix="once")
    print("made", job.id)
