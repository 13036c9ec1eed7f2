"""Runs a command that prints lines of JSON and adds to each `others`, the share of the processor that other programs took meanwhile, and
`load1`. Waits at most M1_PEERS_WAIT seconds (60) for a quiet machine first.

    python watch.py COMMAND ARGUMENTS
"""
import json, os, subprocess, sys, time

ticks, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count()


def busy():
    """CPU seconds of all programs."""
    v = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / ticks


end = time.time() + float(os.environ.get("M1_PEERS_WAIT", 60))
while time.time() < end:
    before = busy()
    time.sleep(0.5)
    if (busy() - before) / 0.5 / cores < 0.1:
        break
all0, start = busy(), time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
own, wall = sum(os.times()[2:4]), time.time() - start
others = round(max(0.0, busy() - all0 - own) / wall / cores, 3)
for line in done.stdout.splitlines():
    if line.startswith("{"):
        print(json.dumps(json.loads(line) | {"others": others, "load1": os.getloadavg()[0]}))
sys.exit(done.returncode)
