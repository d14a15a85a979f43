"""A real node under emulation: Debian with systemd, cgroup version 2, AppArmor, crun and runc, and power that fails.

root.py      builds the root file system once (cached by what goes into it)
disk.py      makes the disk of one run: that root, this checkout, its tests, the registry's data
images.py    the images of the tests, in the data directory of the registry inside the machine
names.py     their names, for what runs inside
machine.py   boots a disk with qemu, runs commands in it, cuts its power
agent.py     runs inside: commands in, results out, over a virtio serial port
inside/      tests that run inside, by the machine's own pytest; test_node.py brings their results out
parts.py     what the tests look at, played beside the tests of other directories on whatever processor time they leave
power_cuts.py   rounds of "cut the power during a pull, boot, look (look.py, inside)"; `python -m tests.vm.power_cuts ROUNDS` runs many
soak.py      by hand: `python -m tests.vm.soak PODS MINUTES` runs pods and restarts the daemon every minute (inside/soak.py)

`make test-vm` runs this directory alone. Downside accepted: emulated without KVM, a second in here is ten outside.
"""
