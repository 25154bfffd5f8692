"""A language model, fine-tuned by hand-written gradients: the book's neighbour that speaks.

Everything here is made of the book's layers, and the book imports nothing from here.

1. `llama`: the decoder that most open language models are; `llamaconfig` has its sizes, and `llamainstance` a small one
   to check
2. `text`: a text as windows of token ids; `records`: the lines of a .jsonl file; `examples`: prompts and completions,
   of which a part counts, and `widths` how far each reaches; `chat`: chats, written as the model's own `chattemplate`
   says; `tokenizer` makes ids of text, and `tokenizerconfig` says what stands beside it
3. `generation`: continues a text, with the keys and values of what it has read; `continuation` makes text of it
4. `trainingmemory`: counts what a training step keeps
5. `modelfiles`: reads a model from a folder, a GGUF or an NPZ, and writes one as a folder; `namedmodel`: the one that a
   user names
6. `finetuning`: what `minilora finetune` is made of
"""
