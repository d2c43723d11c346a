"""What a training run will take, before there is a machine to run it on.

memory.account(experiment, "fsdp=4,seq=64", batch=4, length=2**20)      bytes by formula, without compiling
cost.step(experiment, ...)                                             flops, bytes on the network, seconds, MFU
topology.compile_step(experiment, topology.parse("v6e:16x16"), ...)    what the TPU compiler says
"""
