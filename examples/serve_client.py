"""Ask a running server with the official `openai` client and stream the answer.

In one terminal `vllm serve MODEL --attention-backend spla --block-size 64`, in another
`python examples/serve_client.py "What is a page table?"`.
"""

import argparse
import sys
from pathlib import Path

import openai


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--file", type=Path, help="a text that the question is about, put before it")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    content = f"{args.file.read_text()}\n\n{args.question}" if args.file else args.question
    try:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=args.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
            if chunk.usage:
                print(f"\n\n{model}: {chunk.usage.prompt_tokens} prompt and {chunk.usage.completion_tokens} new tokens")
    except openai.APIConnectionError:
        print(f"no server at {args.base_url}: start `vllm serve MODEL --attention-backend spla`", file=sys.stderr)
        return 1
    except openai.BadRequestError as error:
        print(f"the server refused the request: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
