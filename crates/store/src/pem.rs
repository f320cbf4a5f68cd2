//! Certificates and keys, looked at before they are used: TLS takes a file without any, and then fails at every store.

use std::error::Error;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{ClientTlsConfig, Endpoint, Identity};

/// Why `pem` has no certificate that can be used.
pub fn check_certificates(pem: &[u8]) -> Result<(), String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if all.is_empty() {
        return Err("no certificate in PEM is in it".into());
    }
    let mut store = RootCertStore::empty();
    all.into_iter().try_for_each(|certificate| store.add(certificate)).map_err(|e| e.to_string())
}

/// Why `pem` has no private key.
pub fn check_key(pem: &[u8]) -> Result<(), String> {
    match PrivateKeyDer::from_pem_slice(pem) {
        Ok(_) => Ok(()),
        Err(rustls::pki_types::pem::Error::NoItemsFound) => Err("no private key in PEM is in it".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Why TLS does not take the key for the certificate's.
pub fn check_pair(certificate: &[u8], key: &[u8]) -> Result<(), String> {
    let tls = ClientTlsConfig::new().identity(Identity::from_pem(certificate, key));
    Endpoint::from_static("https://store").tls_config(tls).map(drop).map_err(|error| innermost(&error))
}

/// The last of an error's causes: TLS says the reason there.
pub(crate) fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}
