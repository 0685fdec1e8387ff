//! `#[plugin]`.

use proc_macro2::{Ident, TokenStream};
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Error, FnArg, GenericArgument, ItemFn, LitStr, Path, PathArguments, Result, ReturnType, Token, Type, bracketed, parenthesized,
};

/// `Inference(embed, tokenize)`.
struct Provided {
    interface: Path,
    optional: Vec<Ident>,
}

impl Parse for Provided {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let interface = input.parse()?;
        let mut optional = vec![];
        if input.peek(syn::token::Paren) {
            let content;
            parenthesized!(content in input);
            optional = Punctuated::<Ident, Token![,]>::parse_terminated(&content)?.into_iter().collect();
        }
        Ok(Self { interface, optional })
    }
}

struct Options {
    provides: Vec<Provided>,
    needs: Vec<LitStr>,
}

impl Parse for Options {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let (mut provides, mut needs) = (vec![], vec![]);
        while !input.is_empty() {
            let key: Ident = input.parse()?;
            input.parse::<Token![=]>()?;
            let content;
            bracketed!(content in input);
            if key == "provides" {
                provides = Punctuated::<Provided, Token![,]>::parse_terminated(&content)?.into_iter().collect();
            } else if key == "needs" {
                needs = Punctuated::<LitStr, Token![,]>::parse_terminated(&content)?.into_iter().collect();
            } else {
                return Err(Error::new_spanned(key, "expected `provides` or `needs`"));
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        if provides.is_empty() {
            return Err(input.error("a plugin provides at least one kind: `provides = [Inference]`"));
        }
        Ok(Self { provides, needs })
    }
}

/// `T` of `Result<T>`.
fn result_of(output: &ReturnType) -> Option<Type> {
    let ReturnType::Type(_, ty) = output else { return None };
    let Type::Path(path) = &**ty else { return None };
    let last = path.path.segments.last().filter(|last| last.ident == "Result")?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    match arguments.args.first() {
        Some(GenericArgument::Type(ty)) => Some(ty.clone()),
        _ => None,
    }
}

pub fn expand(attributes: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let Options { provides, needs } = syn::parse2(attributes)?;
    let init: ItemFn = syn::parse2(item)?;
    let signature = &init.sig;
    let wanted = "a plugin starts with `async fn init(host: Host, config: Config) -> Result<T>`";
    let parameters: Vec<&Type> = signature
        .inputs
        .iter()
        .filter_map(|input| match input {
            FnArg::Typed(typed) => Some(&*typed.ty),
            FnArg::Receiver(_) => None,
        })
        .collect();
    let ([_, config], true) = (&parameters[..], signature.asyncness.is_some()) else {
        return Err(Error::new_spanned(signature, wanted));
    };
    let plugin = result_of(&signature.output).ok_or_else(|| Error::new_spanned(signature, wanted))?;
    let ident = &signature.ident;

    let declared = provides.iter().map(|Provided { interface, optional }| {
        let optional = optional.iter().map(Ident::to_string);
        quote! {
            ::fabstir_plugin_api::manifest::Provides {
                kind: <dyn #interface as ::fabstir_plugin_api::interface::Interface>::KIND,
                version: <dyn #interface as ::fabstir_plugin_api::interface::Interface>::VERSION,
                methods: <dyn #interface as ::fabstir_plugin_api::interface::Interface>::METHODS,
                optional: &[#(#optional),*],
            }
            .check()
        }
    });
    let served = provides.iter().map(|Provided { interface, .. }| {
        quote! {
            if kind == <dyn #interface as ::fabstir_plugin_api::interface::Interface>::KIND {
                return Some(<dyn #interface as ::fabstir_plugin_api::interface::Interface>::serve(plugin, call));
            }
        }
    });

    Ok(quote! {
        #init

        struct PluginAuthor;

        impl ::fabstir_plugin_api::instance::Author for PluginAuthor {
            type Plugin = #plugin;
            const ABOUT: ::fabstir_plugin_api::manifest::About = ::fabstir_plugin_api::manifest::About {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
                description: env!("CARGO_PKG_DESCRIPTION"),
                license: env!("CARGO_PKG_LICENSE"),
                needs: &[#(#needs),*],
                provides: &[#(#declared),*],
            };

            fn schema() -> ::fabstir_plugin_api::prelude::schemars::Schema {
                ::fabstir_plugin_api::prelude::schemars::schema_for!(#config)
            }

            fn init(
                host: ::fabstir_plugin_api::context::Host,
                config: ::std::string::String,
            ) -> ::fabstir_plugin_api::instance::InitFuture<#plugin> {
                ::std::boxed::Box::pin(async move {
                    let config: #config = ::fabstir_plugin_api::instance::parse_config(&config)?;
                    #ident(host, config).await
                })
            }

            fn serve(
                plugin: ::std::sync::Arc<#plugin>,
                kind: &str,
                call: ::fabstir_plugin_api::session::Incoming,
            ) -> Option<::fabstir_plugin_api::session::ServeFuture> {
                #(#served)*
                None
            }
        }

        /// Starts an instance in a program that links this plugin statically.
        pub fn connect(
            host: ::fabstir_plugin_api::abi::Port,
        ) -> ::std::result::Result<::std::sync::Arc<dyn ::fabstir_plugin_api::frame::Inbox>, ::std::string::String> {
            ::fabstir_plugin_api::instance::connect::<PluginAuthor>(host)
        }

        #[cfg(feature = "dylib")]
        const _: () = {
            fn exported(
                host: ::fabstir_plugin_api::abi::Port,
            ) -> ::std::result::Result<::std::sync::Arc<dyn ::fabstir_plugin_api::frame::Inbox>, ::std::string::String> {
                ::fabstir_plugin_api::logging::install();
                connect(host)
            }
            fn exported_socket(
                socket: ::std::os::unix::net::UnixStream,
            ) -> ::std::result::Result<(), ::std::string::String> {
                ::fabstir_plugin_api::logging::install();
                ::fabstir_plugin_api::instance::connect_socket::<PluginAuthor>(socket)
            }
            ::fabstir_plugin_api::export_plugin_root!(exported, exported_socket);

            const TEXT: ::fabstir_plugin_api::manifest::Text = ::fabstir_plugin_api::manifest::write(
                &<PluginAuthor as ::fabstir_plugin_api::instance::Author>::ABOUT,
                cfg!(panic = "unwind"),
                cfg!(debug_assertions),
            );
            #[used]
            // SAFETY: the section holds this array and nothing else; it is only read, as bytes of the file.
            #[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".fabstir.plugin"))]
            #[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__fabstir"))]
            static MANIFEST: [u8; TEXT.length] = ::fabstir_plugin_api::manifest::fit(&TEXT);
        };
    })
}
