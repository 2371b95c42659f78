//! Whom the clients in this program trust that ask a server of the operator's choice: `top`, `support-bundle`, `eval --url`, `bench
//! serve`, `pull`, and traces. Not the server's own certificate; not media, which come from public hosts.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context, ensure};
use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// As for OpenSSL, curl and Python: a file of certificates that are trusted instead of the public authorities.
const VARIABLE: &str = "SSL_CERT_FILE";

/// For requests to `url` by ureq.
///
/// # Errors
/// The variable names a file that cannot be read or has no certificate; not asked for an address without TLS.
pub(crate) fn for_requests_to(url: &str) -> anyhow::Result<TlsConfig> {
    let is_tls = url.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"));
    let file = if is_tls { std::env::var_os(VARIABLE) } else { None };
    let mut config = TlsConfig::builder();
    if let Some(own) = certificates(file)? {
        let own: Vec<_> = own.iter().map(|one| Certificate::from_der(one).to_owned()).collect();
        config = config.root_certs(RootCerts::new_with_certs(&own));
    }
    Ok(config.build())
}

/// The same for connections of one's own.
///
/// # Errors
/// The variable names a file that cannot be read or has no certificate.
pub(crate) fn roots() -> anyhow::Result<RootCertStore> {
    let Some(own) = certificates(std::env::var_os(VARIABLE))? else {
        return Ok(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() });
    };
    let mut roots = RootCertStore::empty();
    for one in own {
        roots.add(one).with_context(|| format!("{VARIABLE}: a certificate that cannot be trusted"))?;
    }
    Ok(roots)
}

/// Those of a PEM file; `None` where none is named.
fn certificates(file: Option<OsString>) -> anyhow::Result<Option<Vec<CertificateDer<'static>>>> {
    let Some(path) = file.filter(|file| !file.is_empty()).map(PathBuf::from) else { return Ok(None) };
    let place = || format!("{VARIABLE} {}", path.display());
    let found = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.with_context(place)?;
    ensure!(!found.is_empty(), "{}: has no certificate in PEM form", place());
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_certificates_replaces_the_public_ones_or_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.pem");
        let found = |path: &PathBuf| certificates(Some(path.into()));
        assert!(
            certificates(None).unwrap().is_none() && certificates(Some(OsString::new())).unwrap().is_none()
        );
        let error = |path: &PathBuf| format!("{:#}", found(path).unwrap_err());
        assert!(
            error(&path).contains("SSL_CERT_FILE") && error(&path).contains("own.pem"),
            "{}",
            error(&path)
        );
        std::fs::write(&path, "nothing").unwrap();
        assert!(error(&path).contains("no certificate"), "{}", error(&path));
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n".repeat(2))
            .unwrap();
        assert_eq!(found(&path).unwrap().unwrap().len(), 2);
    }
}
