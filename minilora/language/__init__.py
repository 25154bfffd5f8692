"""A language model that is fine-tuned with hand-written gradients.

Everything here is built from minilora's layers, which import nothing from here.

`llama` is the decoder of most open language models, `config` its sizes, and `generation` samples text from it. `files`
reads and writes a model's weights, tokenizer and chat template. The training data come from `text`, with the
next-token loss, `chat` and `data`. A training is described by a `recipe` and run by `finetune`; `losstable` prints its
losses, `memory` predicts what a step needs, and `resume` continues from a checkpoint. `source` opens a model and an
adapter once for all of them.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
