"""A chat endpoint around transformers on the CPU in float32, so that `spark-engine eval --url` can ask the reference.

python models/spark-tiny-vl/serve_transformers.py [--model models/spark-tiny-vl/bf16] [--port 8011]
spark-engine eval --url http://127.0.0.1:8011 --samples 8 --concurrency 1 --save theirs.jsonl
spark-engine eval models/spark-tiny-vl/bf16 --dtype float32 --samples 8 --save ours.jsonl
python models/spark-tiny-vl/serve_transformers.py --compare theirs.jsonl ours.jsonl

One request at a time, greedy, markers left in the text. Not a server for anything else.
"""
import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def load(folder):
    import torch
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessor.from_pretrained(folder)


def answer(model, tokenizer, processor, body):
    import torch
    from PIL import Image

    images = []
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].split(",", 1)[1]
                images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    text = tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), add_generation_prompt=True,
                                         tokenize=False, **body.get("chat_template_kwargs", {}))
    inputs = {}
    if images:
        inputs = processor(images=images, return_tensors="pt")
        for _, height, width in inputs["image_grid_thw"].tolist():
            count = height * width // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **inputs,
                             max_new_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 512, do_sample=False)
    new = out[0, ids.shape[1]:].tolist()
    ended = new[-1] in model.generation_config.eos_token_id
    return tokenizer.decode(new[:-1] if ended else new), ended, ids.shape[1], len(new)


def compare(theirs, ours):
    read = lambda path: {(x["task"], x["index"]): x for x in map(json.loads, Path(path).read_text().splitlines())}
    theirs, ours = read(theirs), read(ours)
    assert theirs.keys() == ours.keys(), "the files are of different samples"
    whole = ("answer", "reasoning", "finish_reason", "prompt_tokens", "output_tokens")
    kept = lambda line: {name: line.get(name) for name in whole} | {"finish_reason": "stop"}
    different = [key for key in theirs if kept(theirs[key]) != kept(ours[key])]
    for key in different:
        print(*key, kept(theirs[key]), kept(ours[key]), sep="\n  ")
    print(f"{len(theirs) - len(different)} of {len(theirs)} answers are identical")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "bf16"))
    parser.add_argument("--port", type=int, default=8011)
    parser.add_argument("--compare", nargs=2, metavar="FILE")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    parts = load(args.model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": "transformers", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text, ended, prompt, output = answer(*parts, body)
            message = {"role": "assistant", "content": text}
            self.reply({"id": "0", "object": "chat.completion", "choices": [
                {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}],
                "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}})

        def log_message(self, *_):
            pass

    print(f"http://127.0.0.1:{args.port}", flush=True)
    HTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
