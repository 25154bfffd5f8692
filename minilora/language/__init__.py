"""A language model that is fine-tuned with hand-written gradients.

Everything here is built from minilora's layers, which import nothing from here.

`llama` is the decoder of most open language models, `config` has its sizes, and `generation` samples text from it.
`files` reads and writes a model's weights, tokenizer and chat template. `data` makes the training data, from texts with
`text`, which also has the next-token loss, and from conversations with `chat`. A `recipe` describes a fine-tuning, and
`finetune` runs it; `losstable` prints the losses, `memory` predicts the memory of a step, and `resume` continues from a
checkpoint. `source` opens a model and an adapter once for all of them.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
