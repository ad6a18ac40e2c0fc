"""Videos to tiles, in processes of their own: a decoder meets untrusted bytes there and nothing else.

`pool` (in the service) starts `worker` (a process), which runs `preparation`: `container` looks at the file, `pyav` or
`decord` decodes the frames. No torch; `worker` and what it imports stay quick to load.
"""
