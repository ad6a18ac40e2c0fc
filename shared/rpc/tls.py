"""Credentials of servers and channels, made of files that may be replaced while they are in use."""

import grpc

from shared.tls_files import TlsContent, TlsFiles, WatchedTls


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return what a port is bound with; raise `TlsError`.

    Files that have been replaced count from the next connection on; connections that there are go on.
    """
    watched = WatchedTls(files)
    shown = watched.content

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # Called by gRPC at every connection, on a thread of its own, one at a time; None keeps what it has.
        nonlocal shown
        if (content := watched.content) is shown:
            return None
        shown = content
        return _configuration(content)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        renewed,  # type: ignore[arg-type]  # the stubs do not know of None
        require_client_authentication=files.ca_file is not None,
    )


def channel_credentials(content: TlsContent) -> grpc.ChannelCredentials:
    """Return what a channel is opened with. They stay as they are, however long the channel lasts."""
    return grpc.ssl_channel_credentials(content.ca, content.key, content.cert_chain)


def _configuration(content: TlsContent) -> grpc.ServerCertificateConfiguration:
    assert content.key is not None
    assert content.cert_chain is not None
    return grpc.ssl_server_certificate_configuration([(content.key, content.cert_chain)], content.ca)
