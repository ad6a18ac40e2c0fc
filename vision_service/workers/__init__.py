"""Media to tiles, in processes of their own: a decoder meets untrusted bytes there and nothing else.

In the service, `pool` keeps a few `process`es of a kind and asks them through a `channel`. In each of them `worker`
runs what `answers` has for that kind, behind the `confinement` of the process with its `seccomp` filter. `settings` and
`task` are what both sides know. No torch in a worker; what it imports stays quick to load.
"""
