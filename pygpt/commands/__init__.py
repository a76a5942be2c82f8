"""The commands of `pygpt`: one module for each subcommand, and helpers that they share.

COMMANDS is the only list of subcommands. pygpt/__main__.py dispatches by it, and `pygpt --help` prints it."""

COMMANDS = {  # name: its module in this folder, and one line for the help
    "chat": ("chat", "complete texts, on a terminal or through a pipe"),
    "batch": ("batch", "complete or score many prompts from a file, in resumable shards"),
    "train": ("train.main", "train or fine-tune a model on a text"),
    "eval": ("eval", "measure perplexity and HellaSwag accuracy, show next tokens, compare two models"),
    "look": ("look", "look inside: predictions by layer, and the heads that matter"),
    "shards": ("shards", "turn texts into llm.c's token files"),
    "convert": ("convert", "convert a model file to another format"),
    "quantize": ("quantize", "write a model in another weight format, for pygpt or llama.cpp"),
    "download": ("download", "download a GPT-2 model"),
    "serve": ("serve", "answer OpenAI's completions API over HTTP, with a page"),
    "bench": ("bench.main", "compare speed with the machine's limits and with other programs"),
    "profile": ("profile.main", "show where GPT-2 spends its time"),
}
