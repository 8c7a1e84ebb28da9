"""guidellm: a small load on chat and on completions, of which every request has to come back."""

import json
import os
import subprocess
import sys
import tempfile

from checks import MODEL, SERVER, check, report

WORDS = "How is the weather in Paris, and how is it in Rome on a day in June?"


for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):

    @check(path)
    def load(path=path):
        folder = tempfile.mkdtemp()
        data, out = os.path.join(folder, "rows.json"), os.path.join(folder, "out.json")
        with open(data, "w") as file:
            file.writelines(json.dumps({"prompt": f"{i}. {WORDS}"}) + "\n" for i in range(8))
        settings = {
            "backend": f"kind=openai_http,target={SERVER},model={MODEL},request_format={path},max_tokens=12",
            "profile": "kind=concurrent,streams=2",
            "constraint": "kind=max_requests,count=4",
            "data": f"kind=json_file,path={data}",
            "output": f"kind=json,path={out}",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        command = [sys.executable, "-m", "guidellm", "run", *flags, "--disable-console"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, (run.stdout + run.stderr)[-800:]
        with open(out) as file:
            [made] = json.load(file)["benchmarks"]
        totals = made["metrics"]["request_totals"]
        assert totals["successful"] == totals["total"] >= 3, totals  # of the last it may not wait for the count


report("guidellm")
