"""Do the peers compute the same model? Logits of 300 tokens of nano (the last 8 decoded one at a time) against `m1 logits`, all in f32.

    python check.py M1_BINARY LIBRARIES MODELS
"""
import json, os, random, subprocess, sys, tempfile

import numpy as np
from safetensors.numpy import load_file

m1, libraries, models = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
nano = os.path.join(models, "nano-f32")
with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)
    random.seed(3)
    with open(at("ids.json"), "w") as f:
        json.dump([[random.randrange(512) for _ in range(300)]], f)
    go = lambda *command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    go(m1, "logits", "--model", nano, "--device", "cpu", "--tokens", at("ids.json"), "--out", at("m1.safetensors"), "--decode-from", "292")
    go(sys.executable, os.path.join(here, "llama.py"), "logits", libraries, nano + ".gguf", at("ids.json"), at("llama.npy"))
    go(sys.executable, os.path.join(here, "hf.py"), "logits", nano, "f32", at("ids.json"), at("hf.npy"))
    ours = load_file(at("m1.safetensors"))["logits_0"]
    for name in ("llama", "hf"):
        worst = np.abs(np.load(at(name + ".npy")) - ours).max()
        print(f"{name}: logits differ from m1's by {worst:.1e} at most (their deviation is {ours.std():.1f})", file=sys.stderr)
        if not worst < 2e-3:
            sys.exit(f"{name} does not compute M1")
