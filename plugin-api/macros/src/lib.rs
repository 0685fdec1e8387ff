//! The attributes of fabstir-plugin-api. Their documentation stands with [`interface`] and [`plugin`].

use proc_macro::TokenStream;

mod interface;
mod plugin;

/// Makes a trait an interface: `#[interface(kind = "inference", version = "1.0")]` above `#[async_trait]`.
///
/// Every method is `async fn name(&self, cx: &Cx, ..) -> Result<T>`. `T` may be a `Stream<I>`, and the last parameter too. `Blob`
/// as a parameter, a value or an item travels without a copy; everything else is MessagePack. A method without a body that is marked
/// `#[optional]` gets one that answers `Unimplemented`.
///
/// Generates `TraitClient`, which implements the trait over a session, and `Interface` for `dyn Trait`.
#[proc_macro_attribute]
pub fn interface(attributes: TokenStream, item: TokenStream) -> TokenStream {
    interface::expand(attributes.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a crate a plugin: `#[plugin(provides = [Inference(embed), Storage], needs = ["gpu"])]` on
/// `async fn init(host: Host, config: Config) -> Result<T>`.
///
/// `T` implements the provided traits and `Lifecycle`; `Config` implements `Deserialize` and `JsonSchema`. Optional methods that `T`
/// implements are named in parentheses: the others answer `Unimplemented` without reaching `T`.
///
/// Generates the manifest section and the exported root, both only with the crate's feature `dylib`, and `connect` for programs that
/// link the plugin statically.
#[proc_macro_attribute]
pub fn plugin(attributes: TokenStream, item: TokenStream) -> TokenStream {
    plugin::expand(attributes.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
