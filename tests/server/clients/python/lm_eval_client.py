"""lm-eval: answers and likelihoods of tasks on this disk, tokenized by the server."""

import json
import os
import tempfile

from checks import MODEL, URL, check, report

folder = tempfile.mkdtemp()
with open(os.path.join(folder, "rows.jsonl"), "w") as file:
    for city, land in (("Paris", "France"), ("Rome", "Italy"), ("Berlin", "Germany"), ("Madrid", "Spain")):
        file.write(json.dumps({"question": f"{city} is the capital of", "answer": land}) + "\n")
COMMON = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": os.path.join(folder, "rows.jsonl")}, "cache_dir": folder},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "target_delimiter": " ",
}
GENERATE = COMMON | {
    "task": "local_generate",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}
CHOOSE = COMMON | {
    "task": "local_choose",
    "output_type": "multiple_choice",
    "doc_to_choice": ["France", "Italy", "Germany", "Spain"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


def evaluate(kind, path, task, **more):
    import lm_eval

    settings = f"model={MODEL},base_url={URL}{path},num_concurrent=2,max_retries=1,max_length=2048"
    settings += "".join(f",{name}={value}" for name, value in more.items())
    found = lm_eval.simple_evaluate(
        kind, model_args=settings, tasks=[task], bootstrap_iters=0, apply_chat_template="chat" in kind
    )
    return found["results"][task["task"]]


REMOTE = {"tokenizer_backend": "remote"}


@check("loglikelihood")
def loglikelihood():
    assert evaluate("local-completions", "/completions", CHOOSE, **REMOTE)["acc,none"] >= 0.75


@check("generate")
def generate():
    assert "exact_match,none" in evaluate("local-completions", "/completions", GENERATE, **REMOTE)


@check("chat")
def chat():
    os.environ["OPENAI_API_KEY"] = "none"
    assert "exact_match,none" in evaluate("local-chat-completions", "/chat/completions", GENERATE)


report("lm-eval")
