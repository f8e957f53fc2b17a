"""What the client does where the server goes away: `stream PID` ends it in the middle, `create FILE` is not heard."""

import os
import signal
import sys

import openai

client = openai.OpenAI()

if sys.argv[1] == "stream":
    ask = [{"role": "user", "content": "go on for ever"}]
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
