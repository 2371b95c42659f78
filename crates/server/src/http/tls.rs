//! TLS for the accept loop: certificate and key from files, read again when they change, so that a renewed certificate needs no
//! restart.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
    },
    server::TlsStream,
};

/// How often the files are looked at, at most; only when somebody connects.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// A certificate chain and its key, in PEM files.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    certificates: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    changed: [Option<SystemTime>; 2],
    looked: Instant,
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}", path = path.display())]
pub struct TlsError {
    /// The file that is wrong.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl Tls {
    /// Reads `certificates` (the server's first, then its issuers') and `key`.
    ///
    /// # Errors
    /// A file cannot be read or holds nothing of its kind, or the two do not belong together.
    pub fn open(certificates: &Path, key: &Path) -> Result<Self, TlsError> {
        let acceptor = acceptor(certificates, key)?;
        let changed = [changed(certificates), changed(key)];
        let current = Mutex::new(Current { acceptor, changed, looked: Instant::now() });
        Ok(Self(Arc::new(Inner { certificates: certificates.to_owned(), key: key.to_owned(), current })))
    }

    /// Speaks TLS on `stream`.
    ///
    /// # Errors
    /// The other side does not, or has left.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> io::Result<TlsStream<S>> {
        let acceptor = self.acceptor(LOOK_AGAIN);
        acceptor.accept(stream).await
    }

    /// The acceptor of the files as they are, looked at unless that was less than `pause` ago. Files that became unusable leave the
    /// last good ones in force.
    fn acceptor(&self, pause: Duration) -> TlsAcceptor {
        let inner = &*self.0;
        let mut current = inner.current.lock();
        if current.looked.elapsed() >= pause {
            current.looked = Instant::now();
            let now = [changed(&inner.certificates), changed(&inner.key)];
            if now != current.changed {
                match acceptor(&inner.certificates, &inner.key) {
                    Ok(acceptor) => {
                        tracing::info!(
                            "the TLS certificate was read again: {}",
                            inner.certificates.display()
                        );
                        (current.acceptor, current.changed) = (acceptor, now);
                    }
                    // Both files are rarely replaced in one moment: looked at again with the next connections.
                    Err(error) => tracing::warn!("the changed TLS certificate is not used: {error}"),
                }
            }
        }
        current.acceptor.clone()
    }
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn acceptor(certificates: &Path, key: &Path) -> Result<TlsAcceptor, TlsError> {
    let wrong = |path: &Path, reason: String| TlsError { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(certificates, error.to_string()))?;
    if chain.is_empty() {
        return Err(wrong(certificates, "has no certificate in PEM form".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| match error {
        pem::Error::NoItemsFound => {
            let reason = "has no private key in PEM form; take the passphrase off one that has it: openssl pkey -in KEY -out NEW";
            wrong(key, reason.to_owned())
        }
        error => wrong(key, error.to_string()),
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(certificates, error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| wrong(key, format!("does not go with {}: {error}", certificates.display())))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, names: &[&str]) -> [PathBuf; 2] {
        let made =
            rcgen::generate_simple_self_signed(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        let made = made.unwrap();
        let [certificate, key] = ["cert.pem", "key.pem"].map(|name| folder.join(name));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        [certificate, key]
    }

    #[test]
    fn what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let [certificate, key] = write(folder.path(), &["localhost"]);
        assert!(Tls::open(&certificate, &key).is_ok());
        let error = |certificate: &Path, key: &Path| Tls::open(certificate, key).err().unwrap();
        assert_eq!(error(&key, &key).path, key, "no certificate in it");
        let no_key = error(&certificate, &certificate);
        assert!(no_key.path == certificate && no_key.reason.contains("no private key"), "{no_key}");
        assert_eq!(error(&certificate, &folder.path().join("none")).path, folder.path().join("none"));
        let other = tempfile::tempdir().unwrap();
        let [_, other_key] = write(other.path(), &["localhost"]);
        assert_eq!(error(&certificate, &other_key).path, other_key, "another certificate's key");
    }

    #[test]
    fn changed_files_count_and_broken_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let [certificate, key] = write(folder.path(), &["one"]);
        let tls = Tls::open(&certificate, &key).unwrap();
        let same = |tls: &Tls, before: &TlsAcceptor| {
            Arc::ptr_eq(tls.acceptor(Duration::ZERO).config(), before.config())
        };
        let first = tls.acceptor(Duration::ZERO);
        assert!(same(&tls, &first), "unchanged files are not read again");
        let later = SystemTime::now() + Duration::from_secs(10);
        let touch =
            |path: &Path| fs::File::options().write(true).open(path).unwrap().set_modified(later).unwrap();
        fs::write(&certificate, "nothing").unwrap();
        touch(&certificate);
        assert!(same(&tls, &first), "the last good certificate stays");
        write(folder.path(), &["two"]);
        touch(&certificate);
        touch(&key);
        assert!(!same(&tls, &first));
    }
}
