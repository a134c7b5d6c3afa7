"""The servers that a team has around its cluster, each in its own process on loopback: S3 by moto, PostgreSQL, `mlflow
server` with basic authentication, and nginx that adds TLS to any of them. Tests issue their own certificates."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme

from tests.outside.ports import free_port

START_S = 120.0  # enough on a loaded machine
END_S = 10.0


class Server:
    """A process in its own session. `stop` ends it and everything that it has started; its output is in `log`."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log, self.port = folder, folder / f"{name}.log", free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def begin(
        self,
        command: Sequence[str],
        ready: Callable[[], bool],
        *,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Start the process and wait until `ready()`. `options` are arguments of `subprocess.Popen`."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                **options,
            )
        deadline = time.monotonic() + START_S
        while not ready():
            assert self._process.poll() is None, f"{command[0]} ended\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{command[0]} is not up\n{self.log.read_text()}"
            time.sleep(0.05)

    def answers(self, path: str = "/") -> bool:
        """Return whether the server speaks HTTP yet."""
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the process. A second call does nothing."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.wait(END_S)


class S3(Server):
    """moto's S3, which accepts any key, with one bucket named `bucket`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "moto")
        self.address = f"127.0.0.1:{self.port}"
        # As users set them: pyarrow and boto3 read the same variables, and MLflow also its own.
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key-of-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-key-of-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": f"http://{self.address}",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.port)]
        self.begin(command, lambda: self.answers("/moto-api/"))
        request = urllib.request.Request(f"http://{self.address}/bucket", method="PUT", headers=_SIGNED)
        urllib.request.urlopen(request, timeout=60).close()

    def query(self) -> str:
        """Return the query with which a URI itself names the endpoint, if no variable does."""
        return f"endpoint_override={self.address}&scheme=http&region=us-east-1"

    def objects(self) -> dict[str, bytes]:
        """Return every object in the bucket, by its key."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


# moto reads only the service from it.
_SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request, Signature=x"}


class Postgres(Server):
    """PostgreSQL with a password, and with its data in a temporary directory.

    Args:
        folder: The directory for its log.
        programs: The directory of initdb and postgres.
    """

    user, password = "mlflow", "secret-of-postgres"

    def __init__(self, folder: Path, programs: Path) -> None:
        super().__init__(folder, "postgres")
        self._programs = programs
        # Names the driver, because SQLAlchemy's default driver depends on its version.
        self.uri = f"postgresql+psycopg2://{self.user}:{self.password}@127.0.0.1:{self.port}/postgres"
        self._plain_uri = self.uri.replace("+psycopg2", "")
        # Not below pytest's own directory, which only its owner may enter.
        self._data = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # initdb refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self._data, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def start(self) -> None:
        word = self._data / "word"
        word.write_text(self.password)
        word.chmod(0o644)
        data = str(self._data / "data")
        made = [str(self._programs / "initdb"), "-D", data, "-U", self.user, "--pwfile", str(word)]
        made += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=self._data, **self._as)
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        command = [str(self._programs / "postgres"), "-D", data, *(f"--{k}={v}" for k, v in settings.items())]
        self.begin(command, self._takes_calls, cwd=self._data, **self._as)

    def _takes_calls(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self._plain_uri).close()
        except psycopg2.OperationalError:
            return False
        return True

    def rows(self, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        import psycopg2

        with psycopg2.connect(self._plain_uri) as database, database.cursor() as cursor:
            cursor.execute(f"SELECT {columns} FROM {table}")
            return list(cursor.fetchall())

    def everything(self) -> str:
        """Return a dump of the database as SQL."""
        command = [str(self._programs / "pg_dump"), "--inserts", self._plain_uri]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        super().stop(number)
        shutil.rmtree(self._data, ignore_errors=True)


class Mlflow(Server):
    """`mlflow server` with basic authentication, which keeps artifacts at `artifacts`.

    Args:
        folder: The directory for its settings and log.
        database: The URI of the database for runs and users.
        artifacts: A directory or URI.
        environment: Variables with which it reaches both.
    """

    user, password = "admin", "secret-of-mlflow-9"

    def __init__(self, folder: Path, database: str, artifacts: str, environment: Mapping[str, str]) -> None:
        super().__init__(folder, "mlflow")
        self._database, self._artifacts, self._environment = database, artifacts, environment

    def start(self) -> None:
        settings = self.folder / "auth.ini"
        lines = ["[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = {self._database}"]
        lines += [f"admin_username = {self.user}", f"admin_password = {self.password}", "auth_cache_ttl_seconds = 60"]
        settings.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--app-name", "basic-auth", "--workers", "1"]
        command += ["--backend-store-uri", self._database, "--artifacts-destination", self._artifacts]
        environment = {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-tests",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **self._environment,
        }
        self.begin(command, lambda: self.answers("/health"), environment=environment, cwd=self.folder)


class Certificates:
    """A private certificate authority. Its clients trust `ca_file`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._authority = folder, trustme.CA()
        self.ca_file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, *names: str, days: float = 1) -> tuple[Path, Path]:
        """Issue a certificate for host names or addresses. Return its file and the file of its key.

        Args:
            names: Without names: localhost and 127.0.0.1.
            days: How long the certificate is valid; if negative, it has expired.
        """
        issued = self._authority.issue_cert(
            *(names or ("localhost", "127.0.0.1")), not_after=datetime.now(UTC) + timedelta(days=days)
        )
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        for blob in issued.cert_chain_pems:
            blob.write_to_path(str(certificate), append=True)
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key


class Nginx(Server):
    """TLS in front of an HTTP server on loopback, at `https://localhost:PORT`.

    Args:
        folder: Its prefix: configuration, logs and temporary files.
        program: The nginx executable.
        target: The server's port.
        certificate: The files that `Certificates.issue` returns.
        servers: The content of the block `http`, instead of the usual one. The words CERTIFICATE, KEY, PORT and TARGET
            in it stand for the values.
    """

    def __init__(
        self, folder: Path, program: str, target: int, certificate: tuple[Path, Path], servers: str = ""
    ) -> None:
        super().__init__(folder, "nginx")
        self._program = program
        self.uri = f"https://localhost:{self.port}"
        self.requests = folder / "requests.log"
        words = {"CERTIFICATE": certificate[0], "KEY": certificate[1], "PORT": self.port, "TARGET": target}
        self._servers = re.sub(
            r"\b(CERTIFICATE|KEY|PORT|TARGET)\b", lambda found: str(words[found[0]]), servers or _USUAL
        )

    def start(self) -> None:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {self.folder / kind};" for kind in kinds)
        # One process, without a master. If root started a master, its workers would run as another user.
        lines = ["daemon off;", "master_process off;", f"pid {self.folder / 'pid'};", "error_log stderr warn;"]
        lines += ["events { worker_connections 256; }"]
        lines += ["http {", f"access_log {self.requests};", temporary, self._servers, "}"]
        file = self.folder / "nginx.conf"
        file.write_text("\n".join(lines) + "\n")
        self.begin([self._program, "-p", str(self.folder), "-c", str(file), "-e", "stderr"], self._listens)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


_USUAL = """
server {
    listen 127.0.0.1:PORT ssl;
    ssl_certificate CERTIFICATE;
    ssl_certificate_key KEY;
    client_max_body_size 0;
    location / {
        proxy_pass http://127.0.0.1:TARGET;
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $http_connection;
        proxy_buffering off;
        proxy_read_timeout 1h;
    }
}
"""
