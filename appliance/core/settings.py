"""The box's settings: one TOML file, every key typed, an unknown key is an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.core.errors import ApplianceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "box.toml"
_PATHS = (
    "data_dir", "tls_certificate", "tls_key", "tls_authority", "dicom_tls_certificate", "dicom_tls_key", "dicom_client_authority",
    "exchange_dir", "library_root",
    "audit_syslog_ca", "audit_syslog_certificate", "audit_syslog_key",
)  # fmt: skip


class Settings(BaseModel):
    """All settings with their defaults; durations and sizes carry their unit in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path = Field(description="Directory that holds all data of the box.")
    language: str = Field("zh", pattern="^(zh|en)$", description="Language a page opens in before the person chooses.")
    ae_title: str = Field("CLINICBOX", pattern=r"^[!-\[\]-~]{1,16}$", description="AE title of the DICOM receiver.")
    dicom_host: str = Field("127.0.0.1", description="Address the DICOM receiver listens on.")
    dicom_port: int = Field(11112, ge=0, le=65535, description="Port of the DICOM receiver.")
    dicom_max_associations: int = Field(20, ge=1, description="Senders served at the same time.")
    dicom_tls_port: int | None = Field(None, ge=0, le=65535, description="Port of the DICOM receiver over TLS, usually 2762.")
    dicom_tls_certificate: Path | None = Field(None, description="PEM certificate of the DICOM receiver; tls_certificate without it.")
    dicom_tls_key: Path | None = Field(None, description="PEM private key of that certificate; tls_key without it.")
    dicom_client_authority: Path | None = Field(None, description="PEM of the authority that signs senders: they must show a certificate.")
    dicom_plain_senders: tuple[Annotated[str, Field(pattern=r"^[ -\[\]-~]{1,16}@[0-9A-Fa-f.:]+$")], ...] | None = Field(
        None, description="Senders that may do without TLS, as AETITLE@address. Unset: every one, or none where dicom_tls_port is set."
    )
    web_host: str = Field("127.0.0.1", description="Address the web page listens on; any but loopback needs TLS.")
    web_hostname: str = Field("", pattern=r"^[A-Za-z0-9.\-]*$", description="Name that people type for the page; the certificate has it.")
    web_port: int = Field(8080, ge=0, le=65535, description="Port of the web page.")
    web_threads: int = Field(24, ge=2, description="Requests served at the same time.")
    tls_certificate: Path | None = Field(None, description="PEM certificate; with it the page is served over TLS.")
    tls_key: Path | None = Field(None, description="PEM private key of the certificate.")
    tls_authority: Path | None = Field(None, description="PEM of the clinic's authority, where the system's own do not include it.")
    max_upload_bytes: int = Field(256 * 2**20, ge=1, description="Largest single scan or archive entry.")
    max_archive_bytes: int = Field(2 * 2**30, ge=1, description="Largest total that one archive may unpack to.")
    max_archive_files: int = Field(5000, ge=1, description="Most entries that one archive may hold.")
    disk_reserve_bytes: int = Field(512 * 2**20, ge=0, description="Free disk space below which scans are refused.")
    series_idle_s: float = Field(5.0, gt=0, description="Time without a new image after which a series counts as complete.")
    job_deadline_s: float = Field(60.0, gt=0, description="Longest a job may run before it is stopped.")
    job_max_attempts: int = Field(3, ge=1, description="Attempts before a job is shown as failed.")
    process_memory_max_bytes: int = Field(1400 * 2**20, ge=2**28, description="Memory cap of each process of the box.")
    worker_threads: int = Field(0, ge=0, description="Threads for inference; 0 takes the number of cores.")
    exchange_dir: Path | None = Field(None, description="Directory shared with the sync agent: bundles in, status out.")
    library_root: Path | None = Field(None, description="The library's first root.json; with it only signed models are activated.")
    activation_deadline_s: float = Field(1800.0, gt=0, description="Longest that the self-test of a new model may take.")
    tune_at_activation: bool = Field(True, description="Measure every candidate of a new model on this box, and take the fastest.")
    tune_measuring_s: float = Field(60.0, gt=0, description="Longest that measuring may take, engine builds apart.")
    tune_idle_wait_s: float = Field(180.0, ge=0, description="Longest that measuring waits for jobs and other work on the box.")
    triton_url: str = Field(
        "", pattern=r"^(?:(?:https?://)?(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._\-]+)(?::\d{1,5})?(?:/[A-Za-z0-9._~/\-]*)?)?$",
        description="Triton server of the county hub (https://host:port). Empty: nothing is sent. With it only the prepared tensor leaves "
        "the box: pixels, no name, no number, no tag of the scan.",
    )  # fmt: skip
    audit_syslog: str = Field(
        "", pattern=r"^(?:(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._\-]+)(?::\d{1,5})?)?$",
        description="Syslog server of the clinic (host:port, TLS, port 6514 by default) that gets every entry of the audit as a message of "
        "DICOM PS3.15. Empty: nothing is sent. The messages name accounts, patient IDs and UIDs, no patient's name.",
    )  # fmt: skip
    audit_syslog_ca: Path | None = Field(None, description="PEM of the authority that signed the syslog server's certificate.")
    audit_syslog_certificate: Path | None = Field(None, description="PEM certificate that the box shows to the syslog server.")
    audit_syslog_key: Path | None = Field(None, description="PEM private key of that certificate.")
    session_idle_s: float = Field(30 * 60.0, gt=0, description="Inactivity after which a person is logged out.")
    session_absolute_s: float = Field(12 * 3600.0, gt=0, description="Longest a login lasts.")
    help_contact: str = Field(
        "", max_length=80, description="Who gives one-time passwords, as the login page names them (a name, a telephone number)."
    )
    second_factor_for_clinicians: bool = Field(
        False, description="Whether clinicians need a second factor too; all other accounts always do."
    )
    emergency_access_s: float = Field(
        30 * 60.0, gt=0, le=4 * 3600.0, description="How long an emergency access to patient data lasts (technician, system administrator)."
    )
    confirmation_s: float = Field(300.0, gt=0, description="Time after which the password is asked again before what is dangerous.")
    one_time_password_s: float = Field(72 * 3600.0, gt=0, description="Time after which an unused one-time password is refused.")
    password_profile: Literal["asvs", "mlps3"] = Field(
        "asvs", description="Rules for passwords: asvs (8 characters, none of the common ones, no forced change) or mlps3 (GB/T 22239: "
        "three kinds of characters, a change every 90 days, none of the last five).",
    )  # fmt: skip

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Settings:
        """Load a TOML file; relative paths in it are relative to the file.

        Args:
            path: the TOML file, or a data directory that holds one (a data directory without one gets the defaults).
            **overrides: values that win over the file's.

        Raises:
            ApplianceError: ``settings.missing``: the path does not exist; ``settings.invalid``: no valid TOML, an unknown key or a bad
                value.
        """
        values: dict[str, Any] = {}
        if path.is_dir():
            values["data_dir"] = path.resolve()
            path = path / FILE_NAME
        elif not path.is_file():
            raise ApplianceError("settings.missing", str(path))
        if path.is_file():
            try:
                values |= tomllib.loads(path.read_text("utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ApplianceError("settings.invalid", f"{path}: {error}") from error
        return cls.parse(values | overrides, base=path.parent)

    @classmethod
    def parse(cls, values: dict[str, Any], base: Path | None = None) -> Settings:
        """Validate plain values; raises ApplianceError that names each bad key."""
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise ApplianceError("settings.invalid", what) from error
        root = (base or Path.cwd()).resolve()
        paths = {name: root / value for name in _PATHS if (value := getattr(settings, name))}
        return settings.model_copy(update=paths)
